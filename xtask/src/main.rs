//! The project's commands: `cargo xtask COMMAND`.

mod bare;
mod command;
mod cpio;
mod debian;
mod emulator;
mod initrd;
mod run;
mod workplace;

use std::process::ExitCode;

use clap::Parser;

/// Commands of the Testudo project
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Cli {
    /// Boot a guest kernel on a bare-metal hypervisor made of the project's crates
    Boot(command::boot::Boot),
    /// Run the bare-metal test kernel on an emulator
    Selftest(command::bare_metal::Selftest),
    /// Run a bare-metal program on an emulator
    Run(command::bare_metal::Run),
    /// Run all tests: on the host, on emulated bare metal, and end to end
    Test(command::test::Test),
    /// Compare what the crates decide with what a processor does
    Diff(command::diff::Diff),
    /// Run an unmodified hypervisor as the guest, and Linux as its guest
    Nested(command::nested::Nested),
    /// Run a machine's own system as the guest of a hypervisor that started before it
    Bluepill(command::bluepill::Bluepill),
    /// Measure what the hypervisor costs, in instructions
    Measure(command::measure::Measure),
    /// Begin a virtio device: its module, a test with a driver, and a fuzz target, all of which work
    NewDevice(command::new_device::NewDevice),
}

fn main() -> ExitCode {
    let result = match Cli::parse() {
        Cli::Boot(boot) => boot.run(),
        Cli::Selftest(selftest) => selftest.run(),
        Cli::Run(run) => run.run(),
        Cli::Test(test) => test.run(),
        Cli::Diff(diff) => diff.run(),
        Cli::Nested(nested) => nested.run(),
        Cli::Bluepill(bluepill) => bluepill.run(),
        Cli::Measure(measure) => measure.run(),
        Cli::NewDevice(device) => device.run(),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
