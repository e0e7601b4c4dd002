//! The guest's virtio devices and what is behind them.

pub(crate) mod args;
mod console;
mod disk;
mod entropy;
mod ethernet;
mod memory;
mod pmem;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use testudo_arch::memory::GuestRam;
use testudo_machine::virtio::{DeviceHandle, Devices, IommuRef};
use testudo_rt::{self as rt, Boot, println};
use testudo_virtio::Device;
use testudo_virtio::backend::{
    BlockBackend, EchoHost, MemoryTree, ReadOnlyImage, UserHost, UserOptions,
};
use testudo_virtio::device::{
    Blk, BlkOptions, Console, Fs, IommuMemory, Net, NetOptions, Pmem, Rng, Vsock,
};
use testudo_virtio::transport::Options;

use self::args::DeviceArgs;
use self::console::Keyboard;
use self::disk::Disk;
pub(crate) use self::entropy::Source as RandomSource;
pub(crate) use self::ethernet::Ethernet;
use self::memory::{Operator, Services};
pub(crate) use self::pmem::Persistent;
use crate::args::Args;
use crate::memory::ManagedMemory;
use crate::output::Output;

/// Memory that changed blocks of disks leave to the rest of this program.
const RESERVE: u64 = 32 << 20;
/// The guest's number among sockets; the host's is 2.
const GUEST_CID: u64 = 3;
/// The port at which the host echoes on sockets, as on TCP.
const ECHO_PORT: u32 = 7;
/// The name by which the guest mounts what is shared with it.
const SHARE_TAG: &str = "host";

/// The devices' other side.
pub(crate) struct Backends {
    named: Vec<(String, DeviceHandle)>,
    /// Files that the guest may change, by their number among all files.
    disks: Vec<(usize, Disk)>,
    keyboard: Option<Keyboard>,
    iommu: Option<IommuRef>,
    operator: Option<Arc<Operator>>,
}

/// What a guest's devices reach outside its machine.
pub(crate) struct Outside<'a> {
    /// The guest's number.
    pub(crate) guest: usize,
    /// Where it prints.
    pub(crate) output: &'a Output,
    /// The wire to its neighbours.
    pub(crate) ethernet: &'a Ethernet,
}

/// Makes the devices that `args` and the modules called `disk` ask for.
pub(crate) fn build(
    boot: &'static Boot,
    args: &Args<'_>,
    mut memory: ManagedMemory,
    outside: &Outside<'_>,
) -> (Devices<GuestRam>, Backends) {
    // What is typed goes to the guest's console, which may be either.
    let virtio_console = args.guest.contains("console=hvc0");
    let args = &args.devices;
    let mut plan = Plan {
        devices: Devices::new(),
        args,
        backends: Backends {
            named: Vec::new(),
            disks: Vec::new(),
            keyboard: None,
            iommu: None,
            operator: None,
        },
    };
    if args.iommu {
        plan.iommu();
    }
    plan.disks(boot);
    let mut net_options = NetOptions {
        pairs: args.queues,
        ..NetOptions::default()
    };
    // Neighbours have different addresses.
    net_options.mac[5] = net_options.mac[5].wrapping_add(outside.guest as u8);
    if args.net {
        let numbers: String = (1..=40_000).map(|n| format!("{n}\n")).collect();
        let host = UserHost::new(UserOptions::default()).with_page("/numbers", numbers.into());
        plan.add("net", Net::new(host, net_options));
    }
    if args.switch
        && let Some(port) = outside.ethernet.port(outside.guest)
    {
        let card = plan.add("switch", Net::new(port, net_options));
        outside.ethernet.connect(outside.guest, card);
    }
    if args.rng {
        let source = entropy::Source::of_this_processor();
        plan.add("rng", Rng::new(source));
    }
    if args.console {
        let (terminal, keyboard) = console::terminal(outside.output.clone());
        let handle = plan.add("console", Console::new(Box::new(terminal)));
        plan.backends.keyboard = virtio_console.then(|| keyboard(handle));
    }
    if let Some(persistent) = memory.persistent.take() {
        // The last of the files.
        let disks = boot.modules().iter().filter(|module| module.name == "disk");
        let persistent = persistent.numbered(disks.count());
        let (gpa, len) = persistent.place();
        plan.add_direct("pmem", Box::new(Pmem::new(persistent, gpa, len)));
    }
    let mut operator = Operator::new(memory);
    if let Some(mib) = args.balloon_mib {
        operator.add_balloon(mib, |balloon| plan.add_direct("balloon", balloon));
    }
    if let Some(mib) = args.mem_mib {
        operator.add_mem(mib, |mem| plan.add_direct("mem", mem));
    }
    let operator = Arc::new(operator);
    if args.vsock {
        let services = Services {
            echo: EchoHost { port: ECHO_PORT },
            operator: operator.clone(),
        };
        plan.add("vsock", Vsock::new(services, GUEST_CID));
    }
    plan.backends.operator = Some(operator);
    if args.share {
        plan.add("share", Fs::new(shared_tree(boot), SHARE_TAG));
    }
    (plan.devices, plan.backends)
}

/// What the modules hold whose names begin with `share-`, each under the path that its arguments give.
fn shared_tree(boot: &'static Boot) -> MemoryTree {
    let tree = MemoryTree::new();
    boot.modules().iter().fold(tree, |tree, module| {
        let path = module.args;
        match module.name {
            "share-file" => tree.with_file(path, module.data.to_vec()),
            "share-program" => tree.with_program(path, module.data.to_vec()),
            "share-folder" => tree.with_directory(path),
            "share-link" => match core::str::from_utf8(module.data) {
                Ok(target) => tree.with_link(path, target),
                Err(_) => tree,
            },
            _ => tree,
        }
    })
}

struct Plan<'a> {
    devices: Devices<GuestRam>,
    args: &'a DeviceArgs,
    backends: Backends,
}

impl Plan<'_> {
    fn options(&self) -> Options {
        if self.args.packed {
            Options::default()
        } else {
            Options::split()
        }
    }

    /// A device, behind the IOMMU if there is one.
    fn add<D>(&mut self, name: &str, device: D) -> DeviceHandle
    where
        D: Device<GuestRam> + Device<IommuMemory<GuestRam>> + 'static,
    {
        let Some(iommu) = &self.backends.iommu else {
            return self.add_direct(name, Box::new(device));
        };
        let (transport, options) = (self.args.transport, self.options());
        let device = Box::new(device);
        let handle = self.devices.add_behind(iommu, transport, options, device);
        self.keep(name, handle)
    }

    /// A device that is about memory itself: no addresses of its own go through an IOMMU.
    fn add_direct(&mut self, name: &str, device: Box<dyn Device<GuestRam>>) -> DeviceHandle {
        let (transport, options) = (self.args.transport, self.options());
        let handle = self.devices.add(transport, options, device);
        self.keep(name, handle)
    }

    fn keep(&mut self, name: &str, handle: DeviceHandle) -> DeviceHandle {
        self.backends.named.push((name.into(), handle.clone()));
        handle
    }

    /// The IOMMU, which the devices that come after it are behind.
    fn iommu(&mut self) {
        let options = self.options();
        let (handle, iommu) = self.devices.add_iommu(self.args.transport, options);
        self.backends.iommu = Some(iommu);
        self.keep("iommu", handle);
    }

    /// A disk for each module `disk FILE[,ro]`, then the empty one.
    fn disks(&mut self, boot: &'static Boot) {
        let files: Vec<_> = boot
            .modules()
            .iter()
            .filter(|module| module.name == "disk")
            .map(|module| match module.args.strip_suffix(",ro") {
                Some(name) => (name, module.data, true),
                None => (module.args, module.data, false),
            })
            .collect();
        let scratch = self.args.scratch_mib.map_or(0, |mib| mib << 20);
        let sizes = files.iter().map(|(_, data, ro)| {
            let writable = if *ro { 0 } else { data.len() as u64 };
            writable.next_multiple_of(4096)
        });
        let wanted = scratch.saturating_add(sizes.sum());
        let room = rt::memory::available().saturating_sub(RESERVE);
        // A guest that changes more than there is room for finds its disk failing.
        let budget = |size: u64| {
            let share = u128::from(size) * u128::from(room.min(wanted)) / u128::from(wanted.max(1));
            (share as u64).next_multiple_of(4096)
        };
        for (number, (name, data, read_only)) in files.into_iter().enumerate() {
            if read_only {
                self.disk(name, ReadOnlyImage(data));
            } else {
                let disk = Disk::copy_of(data, budget(data.len() as u64));
                self.disk(name, disk.clone());
                self.backends.disks.push((number, disk));
            }
        }
        if scratch > 0 {
            self.disk("scratch", Disk::empty(scratch, budget(scratch)));
        }
    }

    fn disk(&mut self, name: &str, backend: impl BlockBackend + 'static) {
        let file = name.rsplit('/').next().unwrap_or(name);
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(file.bytes()) {
            *to = from;
        }
        let options = BlkOptions {
            id,
            queues: self.args.queues,
            ..BlkOptions::default()
        };
        self.add(name, Blk::new(backend, options));
    }
}

impl Backends {
    /// Gives a character to the virtio console; false if that is not the guest's console.
    pub(crate) fn type_character(&self, byte: u8) -> bool {
        match &self.keyboard {
            Some(keyboard) => {
                keyboard.press(byte);
                true
            }
            None => false,
        }
    }

    /// What is left to do and to say when the guest has ended.
    pub(crate) fn finish(&self, stats: bool) {
        for (name, handle) in &self.named {
            if let Some(fault) = handle.fault() {
                println!("testudo: virtio device {name}: {fault}");
            }
        }
        if let (Some(iommu), true) = (&self.iommu, stats) {
            let state = iommu.state();
            println!(
                "iommu: {} mappings at the end, {} accesses refused",
                state.mappings(),
                state.refused()
            );
        }
        if let (Some(operator), true) = (&self.operator, stats) {
            for line in operator.report() {
                println!("{line}");
            }
        }
        for (number, disk) in &self.disks {
            disk.save(*number);
        }
    }
}
