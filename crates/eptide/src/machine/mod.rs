//! A small PC: processors and interrupt controllers from KVM, memory, a serial port, virtio-mmio
//! devices, and just enough ACPI for a stock kernel.
//!
//! ```text
//! layout      addresses and interrupt lines
//! memory      guest memory and the map the guest is told
//! kernel      kernel images
//! initrd      the initramfs
//! boot        boot protocols: zero page, PVH start info, first registers
//! acpi, cpuid what the guest is told about the machine
//! hypervisor  what is asked of the KVM implementation beyond the KVM API
//! vcpu        processors and their threads
//! bus         ports and MMIO windows
//! event_loop  device threads
//! outcome     how it ends
//! verdict     what the guest reports about the command it was booted for
//! ```

pub(crate) mod acpi;
mod boot;
pub(crate) mod bus;
mod cpuid;
mod event_loop;
pub(crate) mod hypervisor;
mod initrd;
pub(crate) mod kernel;
pub(crate) mod layout;
pub(crate) mod memory;
pub(crate) mod outcome;
pub(crate) mod vcpu;
pub(crate) mod verdict;

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::acpi_pm::{self, AcpiPm};
use crate::devices::i8042::I8042;
use crate::devices::pci::PciConfig;
use crate::devices::serial::{Line, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, DiskError};
use crate::devices::virtio::console::{self, Console, Pending};
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::mmio::{MmioTransport, NOTIFY_OFFSET, SharedTransport};
use crate::report::Report;
use crate::terminal::{self, RawTerminal};
use crate::watch::{Tap, Watch};
use acpi::VirtioWindow;
use bus::{Bus, SharedDevice};
use cpuid::Topology;
use event_loop::EventLoop;
use kernel::{Entry, Protocol};
use memory::GuestMemory;
use outcome::{Outcome, Stop};
use vcpu::{Environment, VcpuThread};
use verdict::{Listener, Verdict};

/// How long processors may take to leave the guest once the machine stops.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Which device the terminal is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ConsoleKind {
    /// The 16550 serial port.
    #[value(name = "ttyS0")]
    Serial,
    /// The virtio console.
    #[value(name = "hvc0")]
    Virtio,
}

/// A disk as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskConfig {
    /// A raw image.
    pub(crate) path: PathBuf,
    /// The guest may not write.
    pub(crate) read_only: bool,
}

/// A machine as asked for.
#[derive(Debug, Clone)]
pub(crate) struct MachineConfig {
    /// bzImage or ELF file.
    pub(crate) kernel: PathBuf,
    /// Initramfs.
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    pub(crate) command_line: String,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// Number of processors.
    pub(crate) cpus: u32,
    /// Disks, in order.
    pub(crate) disks: Vec<DiskConfig>,
    /// Boot protocol.
    pub(crate) protocol: Protocol,
    /// Where the terminal is.
    pub(crate) console: ConsoleKind,
    /// Two-dimensional paging; `None` leaves it to the KVM implementation.
    pub(crate) ept: Option<bool>,
    /// What executes guest code, if not the default.
    pub(crate) engine: Option<kvm::Engine>,
    /// Time after which the guest is ended.
    pub(crate) timeout: Option<Duration>,
    /// The guest is one that reports on the second serial port: when it reads its input, and how its
    /// command or its set-up ended.
    pub(crate) reports: bool,
    /// Nothing is said but errors.
    pub(crate) quiet: bool,
}

/// Why a machine cannot be built or started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// Bad memory size.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// Bad kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// Bad initramfs.
    #[error(transparent)]
    Initrd(#[from] initrd::InitrdError),
    /// Bad command line.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// Too much for the tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// Bad disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// More devices than interrupt lines.
    #[error("{0} virtio devices, but only {max} interrupt lines for them", max = layout::VIRTIO_GSIS.len())]
    TooManyDevices(usize),
    /// More processors than possible.
    #[error("--cpus {asked}: from 1 to {max} are possible")]
    Cpus {
        /// Asked for.
        asked: u32,
        /// Possible.
        max: usize,
    },
    /// A KVM call failed.
    #[error("{what}: {error}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// What it said.
        error: kvm::Error,
    },
    /// A processor could not be set up.
    #[error(transparent)]
    Vcpu(#[from] vcpu::VcpuError),
    /// Two devices in one place.
    #[error(transparent)]
    Overlap(#[from] bus::Overlap),
    /// A queue of impossible size.
    #[error("virtio queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The host refused something.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Names the KVM call that failed.
fn call(what: &'static str) -> impl FnOnce(kvm::Error) -> MachineError {
    move |error| MachineError::Kvm { what, error }
}

/// A machine that is ready to run.
pub(crate) struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    ports: Bus,
    mmio: Bus,
    windows: Vec<VirtioWindow>,
    loops: Vec<EventLoop>,
    input: Option<terminal::Receiver>,
    stop: Stop,
    signals: Signals,
    watch: Watch,
    verdict: Verdict,
    reports: bool,
    timeout: Option<Duration>,
    quiet: bool,
    // Mapped into the guest for as long as the VM lives.
    memory: GuestMemory,
}

impl Machine {
    /// Builds the machine. Everything a person can get wrong is found here.
    pub(crate) fn build(config: &MachineConfig) -> Result<Self, MachineError> {
        let memory = memory::allocate(config.memory)?;
        let kernel = kernel::load(&config.kernel, config.protocol, &memory)?;
        let initrd = config.initrd.as_deref();
        let initrd = initrd
            .map(|path| initrd::load(path, &kernel, &memory))
            .transpose()?;
        boot::write_boot_info(&memory, &kernel, initrd, &config.command_line)?;

        let disks = config
            .disks
            .iter()
            .map(|disk| Block::open(&disk.path, disk.read_only));
        let disks: Vec<Block> = disks.collect::<Result<_, _>>()?;

        // Before the first thread is started: the KVM implementation has threads of its own.
        let signals = Signals::block()?;
        let kvm = hypervisor::open(config.ept, config.engine);
        check_cpus(&kvm, config.cpus)?;
        let vm = Arc::new(create_vm(&kvm, &memory)?);
        let mut machine = Self {
            vm,
            vcpus: Vec::new(),
            ports: Bus::default(),
            mmio: Bus::default(),
            windows: Vec::new(),
            loops: Vec::new(),
            input: None,
            stop: Stop::new()?,
            signals,
            watch: Watch::default(),
            verdict: Verdict::default(),
            reports: config.reports,
            timeout: config.timeout,
            quiet: config.quiet,
            memory,
        };
        machine.add_platform_devices(config.console)?;
        if config.reports {
            machine.add_verdict_port()?;
        }
        machine.add_virtio_devices(disks, config.console)?;
        acpi::write(&machine.memory, config.cpus, &machine.windows)?;
        machine.create_vcpus(&kvm, config.cpus, kernel.entry)?;
        Ok(machine)
    }

    fn add_platform_devices(&mut self, console: ConsoleKind) -> Result<(), MachineError> {
        let line = self.line(layout::COM1_GSI)?;
        let serial = SerialPort::new(Line(line), self.output());
        if console == ConsoleKind::Serial {
            let serial = serial.clone();
            self.input = Some(Box::new(move |typed| serial.receive(typed)));
        }
        let pm = AcpiPm::new(self.stop.clone());
        let keyboard = I8042::new(self.stop.clone());
        let devices: [(u16, u16, SharedDevice); 4] = [
            (layout::COM1_PORT, 8, Arc::new(Mutex::new(serial))),
            (layout::I8042_PORT, 1, Arc::new(Mutex::new(keyboard))),
            (
                layout::ACPI_PM_PORT,
                acpi_pm::LENGTH,
                Arc::new(Mutex::new(pm)),
            ),
            (
                layout::PCI_CONFIG_PORT,
                8,
                Arc::new(Mutex::new(PciConfig::default())),
            ),
        ];
        for (port, length, device) in devices {
            self.ports
                .insert(u64::from(port), u64::from(length), device)?;
        }
        Ok(())
    }

    fn add_verdict_port(&mut self) -> Result<(), MachineError> {
        let line = Line(self.line(layout::COM2_GSI)?);
        let listener = Listener::new(self.verdict.clone(), self.stop.clone());
        let port = SerialPort::new(line, Box::new(listener));
        let port: SharedDevice = Arc::new(Mutex::new(port));
        Ok(self.ports.insert(u64::from(layout::COM2_PORT), 8, port)?)
    }

    fn add_virtio_devices(
        &mut self,
        disks: Vec<Block>,
        console_kind: ConsoleKind,
    ) -> Result<(), MachineError> {
        // A disk waits for the host's file system: each has a thread of its own.
        for disk in disks {
            let mut events = EventLoop::new(self.stop.clone())?;
            self.add_virtio(Box::new(disk), &mut events)?;
            self.loops.push(events);
        }
        let mut events = EventLoop::new(self.stop.clone())?;
        self.add_virtio(Box::new(Entropy), &mut events)?;
        let pending = Pending::default();
        let console = Console::new(pending.clone(), self.output());
        let transport = self.add_virtio(Box::new(console), &mut events)?;
        if console_kind == ConsoleKind::Virtio {
            self.input = Some(Box::new(move |typed| {
                pending.push(typed);
                lock(&transport).notify(console::RECEIVE);
            }));
        }
        self.loops.push(events);
        Ok(())
    }

    /// Puts `device` into the next window; its notifications are served by `events`.
    fn add_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        events: &mut EventLoop,
    ) -> Result<SharedTransport, MachineError> {
        let index = self.windows.len();
        let gsi = *layout::VIRTIO_GSIS
            .get(index)
            .ok_or(MachineError::TooManyDevices(index + 1))?;
        let address = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_STRIDE;
        let size = layout::VIRTIO_MMIO_STRIDE;
        let transport = MmioTransport::new(device, self.memory.clone(), self.line(gsi)?)?;
        let queues = transport.queue_count();
        let transport = Arc::new(Mutex::new(transport));
        for queue in 0..queues {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let notify = IoEventAddress::Mmio(address + NOTIFY_OFFSET);
            self.vm
                .register_ioevent(&event, &notify, queue as u32)
                .map_err(call("KVM_IOEVENTFD"))?;
            let transport = transport.clone();
            let descriptor = event.as_raw_fd();
            events.add(
                descriptor,
                Box::new(move || {
                    // Nothing to read means that another wait has already served it.
                    let _ = event.read();
                    lock(&transport).notify(queue);
                }),
            )?;
        }
        self.mmio.insert(address, size, transport.clone())?;
        self.windows.push(VirtioWindow { address, size, gsi });
        Ok(transport)
    }

    /// An eventfd that raises interrupt line `gsi`.
    fn line(&self, gsi: u32) -> Result<EventFd, MachineError> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm
            .register_irqfd(&line, gsi)
            .map_err(call("KVM_IRQFD"))?;
        Ok(line)
    }

    /// Standard output with an eye on what is shown there.
    fn output(&self) -> Box<dyn io::Write + Send> {
        Box::new(Tap::new(io::stdout(), self.watch.clone()))
    }

    fn create_vcpus(&mut self, kvm: &Kvm, cpus: u32, entry: Entry) -> Result<(), MachineError> {
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let topology = Topology { cpus, tsc_deadline };
        for id in 0..cpus {
            let vcpu = self
                .vm
                .create_vcpu(u64::from(id))
                .map_err(call("KVM_CREATE_VCPU"))?;
            vcpu::prepare(&vcpu, id, topology, &supported, entry)?;
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Runs the machine until it stops, the terminal attached.
    pub(crate) fn run(mut self) -> Result<Ending, MachineError> {
        let mut main_loop = EventLoop::new(self.stop.clone())?;
        self.signals.serve(&mut main_loop, self.stop.clone())?;
        if let Some(timeout) = self.timeout {
            main_loop.add_timeout(timeout, self.stop.clone())?;
        }
        let terminal = self.attach_terminal()?;
        for events in self.loops.drain(..) {
            start_devices(events, self.stop.clone())?;
        }

        let environment = Environment {
            ports: Arc::new(std::mem::take(&mut self.ports)),
            mmio: Arc::new(std::mem::take(&mut self.mmio)),
            stop: self.stop.clone(),
            exits: Arc::default(),
            statistics: Arc::default(),
        };
        self.watch.start();
        let started = Instant::now();
        let mut threads = Vec::new();
        for (id, vcpu) in (0..).zip(self.vcpus.drain(..)) {
            threads.push(VcpuThread::spawn(vcpu, id, environment.clone())?);
        }
        main_loop.run()?;
        let elapsed = started.elapsed();
        stop_threads(&threads);
        drop(terminal);
        Ok(Ending {
            outcome: self.outcome(),
            last_lines: self.watch.last_lines(),
            report: self.report(elapsed, &environment),
        })
    }

    /// The terminal for the console's input; it stays attached for as long as the result lives.
    fn attach_terminal(&mut self) -> io::Result<Option<RawTerminal>> {
        let terminal = RawTerminal::enter()?;
        if let Some(remark) = terminal::input().remark()
            && !self.quiet
        {
            eprintln!("eptide: {remark}");
        }
        if let Some(receive) = self.input.take() {
            let stop = self.stop.clone();
            let verdict = self.reports.then(|| self.verdict.clone());
            terminal::spawn_input(receive, verdict, move || stop.request(Outcome::Quit))?;
        }
        Ok(terminal)
    }

    /// How it ended, in the light of what the guest said before.
    fn outcome(&self) -> Outcome {
        let outcome = self.stop.outcome().expect("the loop ends only on a stop");
        match outcome {
            Outcome::Reset | Outcome::TripleFault | Outcome::Timeout(_) => {
                if let Some(words) = self.watch.panic() {
                    return Outcome::Panic(words);
                }
            }
            _ => {}
        }
        match outcome {
            // A guest that cannot switch itself off does what it can.
            Outcome::PowerOff | Outcome::Reset | Outcome::Timeout(_) => {
                self.verdict.get().unwrap_or(outcome)
            }
            other => other,
        }
    }

    fn report(&self, elapsed: Duration, environment: &Environment) -> Report {
        let exits = &environment.exits;
        let mut statistics = environment
            .statistics
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .clone();
        hypervisor::add_mmu(&mut statistics, &self.vm);
        Report {
            elapsed,
            time_to_init: self.watch.time_to_init(),
            user_exits: vec![
                ("port I/O", exits.port.load(Ordering::Relaxed)),
                ("MMIO", exits.mmio.load(Ordering::Relaxed)),
                ("interrupted", exits.interrupted.load(Ordering::Relaxed)),
            ],
            statistics,
        }
    }
}

/// A machine that has stopped.
pub(crate) struct Ending {
    /// Why.
    pub(crate) outcome: Outcome,
    /// What its consoles showed last.
    pub(crate) last_lines: Vec<String>,
    /// What happened.
    pub(crate) report: Report,
}

/// Serves devices on a thread of their own.
fn start_devices(mut events: EventLoop, stop: Stop) -> io::Result<()> {
    let serve = move || {
        if let Err(error) = events.run() {
            stop.request(Outcome::Failure(format!("device thread: {error}")));
        }
    };
    let thread = thread::Builder::new().name("devices".into());
    thread.spawn(serve).map(drop)
}

/// Kicks processors until they have left the guest. One that does not is left to the end of the
/// process; the caller is about to exit.
fn stop_threads(threads: &[VcpuThread]) {
    let deadline = Instant::now() + STOP_PATIENCE;
    while Instant::now() < deadline {
        let mut running = threads
            .iter()
            .filter(|thread| !thread.is_finished())
            .peekable();
        if running.peek().is_none() {
            return;
        }
        running.for_each(VcpuThread::kick);
        thread::sleep(Duration::from_millis(1));
    }
    tracing::warn!("a processor did not leave the guest in time");
}

fn lock(transport: &SharedTransport) -> std::sync::MutexGuard<'_, MmioTransport> {
    transport
        .lock()
        .unwrap_or_else(|poison| poison.into_inner())
}

fn check_cpus(kvm: &Kvm, asked: u32) -> Result<(), MachineError> {
    let max = kvm.get_max_vcpus();
    match asked {
        1.. if asked as usize <= max => Ok(()),
        _ => Err(MachineError::Cpus { asked, max }),
    }
}

fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, MachineError> {
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is owned by `memory`, which the machine keeps for as long as the
        // VM; no other slot overlaps it.
        unsafe { vm.set_user_memory_region(slot) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(call("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// Signals that ask the process to end, turned into an orderly stop.
struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    const ASKING_TO_END: [libc::c_int; 4] =
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

    /// Blocks them in this thread and, by inheritance, in those started later.
    fn block() -> io::Result<Self> {
        let set = vmm_sys_util::signal::create_sigset(&Self::ASKING_TO_END)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // SAFETY: `set` is initialised and the old mask is not asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
            0 => Ok(Self { set }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    fn serve(&self, events: &mut EventLoop, stop: Stop) -> io::Result<()> {
        use std::io::Read;
        use std::os::fd::FromRawFd;
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let descriptor =
            unsafe { libc::signalfd(-1, &self.set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let mut file = unsafe { std::fs::File::from_raw_fd(descriptor) };
        let handler = move || {
            let mut info = [0; size_of::<libc::signalfd_siginfo>()];
            if file.read_exact(&mut info).is_ok() {
                let number = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
                stop.request(Outcome::Signal(number));
            }
        };
        events.add(descriptor, Box::new(handler))
    }
}
