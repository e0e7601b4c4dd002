//! `cargo xtask run PROGRAM` and `cargo xtask selftest`: a bare-metal program on an emulator.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::bare::{self, Payload};
use crate::emulator::{Cpu, Kind, Loader, Machine};
use crate::run;

/// Run a bare-metal program on an emulator
#[derive(clap::Args)]
pub(crate) struct Run {
    /// The program's package, such as tiny-svm
    program: String,
    #[command(flatten)]
    place: Place,
    /// The program's command line
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Run the bare-metal test kernel on an emulator
#[derive(clap::Args)]
pub(crate) struct Selftest {
    #[command(flatten)]
    place: Place,
    /// Run only the cases whose names contain one of these
    filter: Vec<String>,
}

/// The machine that a program runs on.
#[derive(clap::Args)]
struct Place {
    /// The emulator
    #[arg(long, value_enum, default_value = "qemu")]
    emulator: Kind,
    /// The processor's virtualization
    #[arg(long, value_enum, default_value = "svm")]
    cpu: Cpu,
    /// How the program gets into the machine; Bochs always starts GRUB
    #[arg(long, value_enum, default_value = "direct")]
    loader: Loader,
    /// An IOMMU of QEMU's, and a device behind it that copies memory as it is told
    #[arg(long, value_enum)]
    iommu: Option<Iommu>,
    /// The machine's processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    processors: u32,
    /// The machine's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// End the run after this time, with status 124
    #[arg(long, value_name = "SECS", default_value_t = 600)]
    timeout: u64,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

/// An IOMMU of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Iommu {
    /// VT-d
    Intel,
    /// AMD-Vi
    Amd,
}

impl Iommu {
    /// The arguments that make it and the device.
    fn arguments(self) -> Vec<String> {
        let unit = match self {
            Self::Intel => "intel-iommu",
            Self::Amd => "amd-iommu",
        };
        ["-M", "q35", "-device", unit, "-device", "edu"]
            .map(String::from)
            .to_vec()
    }
}

impl Run {
    pub(crate) fn run(&self) -> Result<u8> {
        self.place.run(&self.program, &self.arguments)
    }
}

impl Selftest {
    pub(crate) fn run(&self) -> Result<u8> {
        self.place.run("selftest", &self.filter)
    }
}

impl Place {
    fn run(&self, package: &str, arguments: &[String]) -> Result<u8> {
        run::set_verbose(self.verbose);
        if self.iommu.is_some() && self.emulator != Kind::Qemu {
            bail!("only QEMU has IOMMUs");
        }
        let machine = Machine {
            cpu: self.cpu,
            loader: self.loader,
            processors: self.processors,
            memory: self.memory,
            timeout: Some(Duration::from_secs(self.timeout)),
            extra: self.iommu.map(Iommu::arguments).unwrap_or_default(),
            ..Machine::new(self.emulator)
        };
        let payload = Payload {
            command_line: arguments.join(" "),
            modules: Vec::new(),
        };
        machine.run(&bare::build(package)?, &payload)
    }
}
