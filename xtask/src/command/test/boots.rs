//! End-to-end boots: `cargo xtask boot` as a user runs it.

use std::fs;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, anyhow, bail};

use super::Tally;
use crate::bare;
use crate::debian;
use crate::emulator::TIMED_OUT;
use crate::run;
use crate::workplace::RunFolder;

/// What a boot must come to.
enum Expect {
    /// This exit status.
    Status(u8),
    /// Any status but success, and an end by itself.
    Failure,
}

struct Boot {
    name: &'static str,
    /// Words that start with `@` name files of this test's making (see [`files`]).
    arguments: &'static [&'static str],
    expect: Expect,
    /// What the output, errors included, must contain.
    says: &'static [&'static str],
    /// Only with `--full`.
    slow: bool,
}

use Expect::{Failure, Status};

const BOOTS: &[Boot] = &[
    Boot {
        name: "boot::linux_reaches_userspace",
        arguments: &["--run", "uname -a"],
        expect: Status(0),
        says: &["Linux", "x86_64"],
        slow: false,
    },
    Boot {
        name: "boot::status_of_the_commands_comes_out",
        arguments: &["--run", "exit 137"],
        expect: Status(137),
        says: &[],
        slow: false,
    },
    Boot {
        name: "boot::two_processors_run",
        arguments: &[
            "--vcpus",
            "2",
            "--run",
            "echo processors: $(nproc); cat /proc/interrupts",
        ],
        expect: Status(0),
        says: &["processors: 2"],
        slow: false,
    },
    Boot {
        name: "boot::two_guests_run_side_by_side",
        arguments: &["--guests", "2", "--run", "exit $(nproc)"],
        expect: Status(1),
        says: &[],
        slow: false,
    },
    Boot {
        name: "boot::a_disk_of_two_guests_is_an_error",
        arguments: &["--guests", "2", "--disk", "@large", "--run", "true"],
        expect: Failure,
        says: &["one guest only"],
        slow: false,
    },
    Boot {
        name: "boot::shadow_paging_runs_two_processors",
        arguments: &[
            "--paging",
            "shadow",
            "--vcpus",
            "2",
            "--stats",
            "--run",
            "echo processors: $(nproc)",
        ],
        expect: Status(0),
        says: &["processors: 2", "faults filled"],
        slow: false,
    },
    Boot {
        name: "boot::shadow_paging_is_chosen_where_there_is_no_other",
        arguments: &["--no-nested-paging", "--run", "uname -a"],
        expect: Status(0),
        says: &["no nested paging", "Linux"],
        slow: false,
    },
    Boot {
        name: "boot::nested_paging_where_there_is_none_is_an_error",
        arguments: &["--no-nested-paging", "--paging", "nested", "--run", "true"],
        expect: Failure,
        says: &["no nested paging"],
        slow: false,
    },
    Boot {
        name: "boot::test_kernel_passes_on_shadow_paging",
        arguments: &[
            "--paging",
            "shadow",
            "--kernel",
            "@selftest",
            "--vcpus",
            "2",
            "--cmdline",
            "",
        ],
        expect: Status(0),
        says: &[" passed, 0 failed"],
        slow: false,
    },
    Boot {
        name: "boot::memory_is_what_was_asked_for",
        arguments: &[
            "--memory",
            "300",
            "--run",
            "test $(awk '/MemTotal/{print $2}' /proc/meminfo) -gt 240000",
        ],
        expect: Status(0),
        says: &[],
        slow: false,
    },
    Boot {
        name: "boot::time_passes",
        arguments: &[
            "--run",
            "a=$(date +%s); sleep 2; b=$(date +%s); test $((b - a)) -ge 2 -a $((b - a)) -le 4",
        ],
        expect: Status(0),
        says: &[],
        slow: false,
    },
    Boot {
        name: "boot::statistics_are_printed",
        arguments: &["--stats", "--run", "true"],
        expect: Status(0),
        says: &["CPUID"],
        slow: false,
    },
    Boot {
        name: "boot::test_kernel_passes_as_a_guest",
        arguments: &["--kernel", "@selftest", "--vcpus", "2", "--cmdline", ""],
        expect: Status(0),
        says: &[" passed, 0 failed"],
        slow: false,
    },
    Boot {
        name: "boot::test_kernel_passes_as_a_guest_on_vmx",
        arguments: &[
            "--backend",
            "vmx",
            "--kernel",
            "@selftest",
            "--vcpus",
            "2",
            "--cmdline",
            "",
        ],
        expect: Status(0),
        says: &[" passed, 0 failed"],
        slow: false,
    },
    Boot {
        name: "boot::test_kernel_passes_on_vmx_on_shadow_paging",
        arguments: &[
            "--backend",
            "vmx",
            "--paging",
            "shadow",
            "--kernel",
            "@selftest",
            "--vcpus",
            "2",
            "--cmdline",
            "",
        ],
        expect: Status(0),
        says: &[" passed, 0 failed"],
        slow: false,
    },
    Boot {
        name: "boot::vmx_where_there_is_none_is_an_error",
        arguments: &["--backend", "vmx", "--emulator", "qemu", "--run", "true"],
        expect: Failure,
        says: &["no VMX"],
        slow: false,
    },
    Boot {
        name: "boot::more_vcpus_than_processors_is_an_error",
        arguments: &["--vcpus", "2", "--processors", "1", "--run", "true"],
        expect: Failure,
        says: &["processors"],
        slow: false,
    },
    Boot {
        name: "boot::missing_kernel_is_an_error",
        arguments: &["--kernel", "/nonexistent/vmlinuz"],
        expect: Failure,
        says: &["/nonexistent/vmlinuz"],
        slow: false,
    },
    Boot {
        name: "boot::empty_kernel_is_an_error",
        arguments: &["--kernel", "@empty"],
        expect: Failure,
        says: &["kernel"],
        slow: false,
    },
    Boot {
        name: "boot::text_as_kernel_is_an_error",
        arguments: &["--kernel", "@text"],
        expect: Failure,
        says: &["kernel"],
        slow: false,
    },
    Boot {
        name: "boot::truncated_kernel_is_an_error",
        arguments: &["--kernel", "@truncated", "--timeout", "120"],
        expect: Failure,
        says: &["kernel"],
        slow: false,
    },
    Boot {
        name: "boot::arm_kernel_is_an_error",
        arguments: &["--kernel", "@arm"],
        expect: Failure,
        says: &["kernel"],
        slow: false,
    },
    Boot {
        name: "boot::too_little_memory_is_an_error",
        arguments: &["--memory", "4", "--run", "true"],
        expect: Failure,
        says: &["memory"],
        slow: false,
    },
    Boot {
        name: "boot::too_large_initrd_is_an_error",
        arguments: &["--memory", "64", "--initrd", "@large", "--timeout", "120"],
        expect: Failure,
        says: &["memory"],
        slow: false,
    },
    Boot {
        name: "boot::triple_fault_is_an_error",
        arguments: &[
            "--cmdline",
            "console=ttyS0 quiet reboot=triple",
            "--run",
            "reboot -f",
        ],
        expect: Failure,
        says: &["triple fault", "vCPU 0", "64-bit mode", "rip "],
        slow: false,
    },
    Boot {
        name: "boot::endless_guest_is_ended",
        arguments: &["--timeout", "4", "--run", "while true; do :; done"],
        expect: Status(TIMED_OUT),
        says: &["its time was up", "vCPU 0", "rip "],
        slow: false,
    },
    Boot {
        name: "boot::linux_on_vmx",
        arguments: &[
            "--backend",
            "vmx",
            "--vcpus",
            "2",
            "--timeout",
            "900",
            "--run",
            "echo processors: $(nproc)",
        ],
        expect: Status(0),
        says: &["processors: 2"],
        slow: true,
    },
    Boot {
        name: "boot::linux_on_vmx_on_shadow_paging",
        arguments: &[
            "--backend",
            "vmx",
            "--paging",
            "shadow",
            "--vcpus",
            "2",
            "--timeout",
            "1800",
            "--run",
            "echo processors: $(nproc)",
        ],
        expect: Status(0),
        says: &["processors: 2"],
        slow: true,
    },
    Boot {
        name: "boot::linux_on_bochs",
        arguments: &[
            "--emulator",
            "bochs",
            "--timeout",
            "900",
            "--run",
            "uname -a",
        ],
        expect: Status(0),
        says: &["Linux"],
        slow: true,
    },
];

pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    let boots = BOOTS.iter().filter(|boot| full || !boot.slow);
    let wanted: Vec<_> = boots.filter(|boot| tally.wants(boot.name)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    run::progress("end-to-end boots");
    let folder = RunFolder::new()?;
    files(&folder)?;
    for boot in wanted {
        tally.check(boot.name, || boot.run(&folder));
    }
    Ok(())
}

/// The files that the boots name with `@`.
fn files(folder: &RunFolder) -> Result<()> {
    let kernel = fs::read(debian::kernel()?.image).context("cannot read the kernel")?;
    fs::copy(bare::build("selftest")?, folder.file("selftest"))?;
    fs::write(folder.file("empty"), [])?;
    fs::write(folder.file("text"), "This is no kernel.\n".repeat(100))?;
    fs::write(folder.file("truncated"), &kernel[..kernel.len() / 3])?;
    let mut arm = vec![0_u8; 4096];
    // ELF64, little-endian, an executable for AArch64.
    arm[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
    fs::write(folder.file("arm"), arm)?;
    fs::write(folder.file("large"), vec![0_u8; 80 << 20])?;
    Ok(())
}

impl Boot {
    fn run(&self, folder: &RunFolder) -> Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("boot").stdin(Stdio::null());
        for argument in self.arguments {
            match argument.strip_prefix('@') {
                Some(name) => command.arg(folder.file(name)),
                None => command.arg(argument),
            };
        }
        if !self.arguments.contains(&"--timeout") {
            command.args(["--timeout", "60"]);
        }
        // Instructions as time: a busy machine must not look like a slow processor to the guest.
        if !["vmx", "bochs"]
            .iter()
            .any(|slow| self.arguments.contains(slow))
        {
            command.arg("--exact");
        }
        let output = command.output().context("cannot run xtask")?;
        self.judge(&output)
            .map_err(|reason| anyhow!("{reason}; the output was:\n{}", text(&output)))
    }

    fn judge(&self, output: &Output) -> Result<()> {
        let status = output
            .status
            .code()
            .and_then(|code| u8::try_from(code).ok());
        match self.expect {
            Status(wanted) if status != Some(wanted) => {
                bail!("the status is {}, not {wanted}", output.status);
            }
            Failure if matches!(status, None | Some(0 | TIMED_OUT)) => {
                bail!("the status is {}, not one of failure", output.status);
            }
            _ => {}
        }
        let text = text(output);
        match self.says.iter().find(|words| !text.contains(**words)) {
            Some(words) => bail!("nothing says «{words}»"),
            None => Ok(()),
        }
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
