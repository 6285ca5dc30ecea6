//! irqfds and ioeventfds: interrupts and doorbells as file descriptors.
//!
//! The kernel holds a reference to an eventfd that a VMM registers, so a VMM may close its own
//! descriptor; here the descriptor is duplicated. One thread per VM, started with the first
//! irqfd, waits on all of them. An ioeventfd needs no thread: the vCPU that writes signals it.

use crate::error::{Error, Result, fail};
use crate::irqchip::{AckNotifier, IrqChip, LineSource};
use arc_swap::ArcSwap;
use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
    kvm_irqfd,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::fd::{BorrowedFd, OwnedFd, RawFd};
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

fn errno(error: rustix::io::Errno) -> Error {
    Error::new(error.raw_os_error())
}

/// An eventfd that user space registered: a duplicate, and what tells it from others.
#[derive(Debug)]
struct Registered {
    fd: OwnedFd,
    identity: u64,
}

/// Tells whether two descriptors are the same eventfd: the kernel's ID for it where the kernel
/// shows one, else the number it was registered under.
fn identity(fd: RawFd) -> u64 {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("eventfd-id:"));
    match id.and_then(|id| id.trim().parse::<u64>().ok()) {
        Some(id) => id | 1 << 63,
        None => fd as u64,
    }
}

impl Registered {
    /// Duplicates `fd`, which must be an open eventfd.
    fn new(fd: RawFd) -> Result<Registered> {
        if fd < 0 {
            return fail(libc::EBADF);
        }
        // SAFETY: the descriptor is only borrowed for this call, which fails on one that is not
        // open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let copy = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(errno)?;
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let is_other = link
            .to_str()
            .is_some_and(|s| !s.is_empty() && !s.contains("eventfd"));
        if is_other {
            return fail(libc::EINVAL);
        }
        Ok(Registered {
            fd: copy,
            identity: identity(fd),
        })
    }

    fn signal(&self) {
        // A counter at its maximum is already signalled; nothing is lost by not adding.
        let ready = poll_now(&self.fd, PollFlags::OUT);
        if ready {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Takes the count; false if it was zero.
    fn consume(&self) -> bool {
        let mut count = [0; 8];
        poll_now(&self.fd, PollFlags::IN)
            && rustix::io::read(&self.fd, &mut count).is_ok_and(|n| n == 8)
    }
}

fn poll_now(fd: &OwnedFd, flags: PollFlags) -> bool {
    let zero = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(fd, flags)], Some(&zero)).is_ok_and(|ready| ready > 0)
}

struct IrqFd {
    event: Registered,
    gsi: u32,
    resample: Option<Registered>,
    chip: Weak<IrqChip>,
    /// Cleared when the irqfd is taken away; nothing is raised afterwards.
    is_assigned: Mutex<bool>,
}

impl IrqFd {
    fn signalled(&self) {
        let assigned = self.assigned();
        if !*assigned || !self.event.consume() {
            return;
        }
        let Some(chip) = self.chip.upgrade() else {
            return;
        };
        if self.resample.is_some() {
            chip.set_line(self.gsi, LineSource::Resample, true);
        } else {
            chip.pulse(self.gsi);
        }
    }

    fn assigned(&self) -> MutexGuard<'_, bool> {
        let assigned = self.is_assigned.lock();
        assigned.unwrap_or_else(PoisonError::into_inner)
    }

    /// When this returns, the irqfd raises nothing any more.
    fn unassign(&self) {
        *self.assigned() = false;
    }
}

impl AckNotifier for IrqFd {
    fn acknowledged(&self, gsi: u32) {
        let Some(resample) = &self.resample else {
            return;
        };
        if let Some(chip) = self.chip.upgrade() {
            chip.set_line(gsi, LineSource::Resample, false);
        }
        resample.signal();
    }
}

#[derive(Default)]
struct Table {
    by_key: HashMap<u64, Arc<IrqFd>>,
    next_key: u64,
    thread: Option<Waiter>,
}

struct Waiter {
    epoll: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    handle: Option<JoinHandle<()>>,
}

/// Key of the descriptor that ends the thread.
const STOP: u64 = u64::MAX;

/// The irqfds of a VM.
#[derive(Default)]
pub struct IrqFds {
    table: Arc<Mutex<Table>>,
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IrqFds {
    /// KVM_IRQFD.
    pub fn apply(&self, request: &kvm_irqfd, chip: &Arc<IrqChip>) -> Result<()> {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return fail(libc::EINVAL);
        }
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            return self.deassign(request.fd as RawFd, request.gsi);
        }
        let resample =
            (request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0).then_some(request.resamplefd as RawFd);
        self.assign(request.fd as RawFd, request.gsi, resample, chip)
    }

    fn assign(
        &self,
        fd: RawFd,
        gsi: u32,
        resample: Option<RawFd>,
        chip: &Arc<IrqChip>,
    ) -> Result<()> {
        let event = Registered::new(fd)?;
        let resample = resample.map(Registered::new).transpose()?;
        let mut table = lock(&self.table);
        if table
            .by_key
            .values()
            .any(|other| other.event.identity == event.identity)
        {
            return fail(libc::EBUSY);
        }
        if table.thread.is_none() {
            table.thread = Some(self.start()?);
        }
        let irqfd = Arc::new(IrqFd {
            event,
            gsi,
            resample,
            chip: Arc::downgrade(chip),
            is_assigned: Mutex::new(true),
        });
        if irqfd.resample.is_some() {
            let notifier: Arc<dyn AckNotifier> = irqfd.clone();
            chip.add_notifier(gsi, Arc::downgrade(&notifier));
        }
        let key = table.next_key;
        table.next_key += 1;
        if let Some(waiter) = &table.thread {
            let data = epoll::EventData::new_u64(key);
            epoll::add(&*waiter.epoll, &irqfd.event.fd, data, epoll::EventFlags::IN)
                .map_err(errno)?;
        }
        table.by_key.insert(key, irqfd);
        Ok(())
    }

    fn deassign(&self, fd: RawFd, gsi: u32) -> Result<()> {
        let identity = Registered::new(fd)?.identity;
        let mut table = lock(&self.table);
        let found = table
            .by_key
            .iter()
            .find(|(_, irqfd)| irqfd.event.identity == identity && irqfd.gsi == gsi)
            .map(|(&key, _)| key);
        // Removing what is not there succeeds, as it does in KVM.
        let Some(key) = found else { return Ok(()) };
        if let Some(irqfd) = table.by_key.remove(&key)
            && let Some(waiter) = &table.thread
        {
            let _ = epoll::delete(&*waiter.epoll, &irqfd.event.fd);
            irqfd.unassign();
            // The last that shares the line lets go of it.
            let shares = |other: &Arc<IrqFd>| other.gsi == gsi && other.resample.is_some();
            if shares(&irqfd)
                && !table.by_key.values().any(shares)
                && let Some(chip) = irqfd.chip.upgrade()
            {
                chip.set_line(gsi, LineSource::Resample, false);
            }
        }
        Ok(())
    }

    fn start(&self) -> Result<Waiter> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(errno)?);
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(errno)?);
        let data = epoll::EventData::new_u64(STOP);
        epoll::add(&*epoll, &*stop, data, epoll::EventFlags::IN).map_err(errno)?;
        let (waits_on, table) = (epoll.clone(), Arc::downgrade(&self.table));
        let handle = crate::helpers::spawn("kvm-irqfd", move || wait(&waits_on, &table))
            .map_err(|_| Error::new(libc::ENOMEM))?;
        Ok(Waiter {
            epoll,
            stop,
            handle: Some(handle),
        })
    }
}

fn wait(epoll: &OwnedFd, table: &Weak<Mutex<Table>>) {
    let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); 32];
    loop {
        let ready = match epoll::wait(epoll, &mut buffer, None) {
            Ok((ready, _)) => ready,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        };
        for event in ready.iter() {
            let key = event.data.u64();
            if key == STOP {
                return;
            }
            let Some(table) = table.upgrade() else { return };
            let irqfd = lock(&table).by_key.get(&key).cloned();
            if let Some(irqfd) = irqfd {
                irqfd.signalled();
            }
        }
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        let waiter = lock(&self.table).thread.take();
        if let Some(mut waiter) = waiter {
            let _ = rustix::io::write(&*waiter.stop, &1u64.to_ne_bytes());
            if let Some(handle) = waiter.handle.take()
                && handle.thread().id() != std::thread::current().id()
            {
                let _ = handle.join();
            }
        }
    }
}

/// Port or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoSpace {
    /// Port I/O.
    Port,
    /// Memory-mapped I/O.
    Memory,
}

#[derive(Debug)]
struct IoEventFd {
    event: Registered,
    space: IoSpace,
    address: u64,
    /// Access length; 0 matches any.
    length: u32,
    datamatch: Option<u64>,
}

impl IoEventFd {
    fn matches(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        if self.space != space || self.address != address {
            return false;
        }
        if self.length == 0 {
            return true;
        }
        let mut value = [0; 8];
        if data.len() != self.length as usize {
            return false;
        }
        value[..data.len()].copy_from_slice(data);
        self.datamatch
            .is_none_or(|wanted| wanted == u64::from_le_bytes(value))
    }

    fn collides(&self, other: &IoEventFd) -> bool {
        let same_length = self.length == 0 || other.length == 0 || self.length == other.length;
        let same_data = match (self.datamatch, other.datamatch) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        self.space == other.space && self.address == other.address && same_length && same_data
    }
}

/// The ioeventfds of a VM.
#[derive(Debug, Default)]
pub struct IoEventFds {
    all: ArcSwap<Vec<Arc<IoEventFd>>>,
    /// Some were registered once: most VMs that have none never look at the list.
    is_used: AtomicBool,
    update: Mutex<()>,
}

impl IoEventFds {
    /// KVM_IOEVENTFD.
    pub fn apply(&self, request: &kvm_ioeventfd) -> Result<()> {
        const PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
        const DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
        const DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;
        if request.flags & !(PIO | DATAMATCH | DEASSIGN) != 0
            || !matches!(request.len, 0 | 1 | 2 | 4 | 8)
            || request.addr.checked_add(request.len as u64).is_none()
            || (request.len == 0 && request.flags & DATAMATCH != 0)
        {
            return fail(libc::EINVAL);
        }
        let space = if request.flags & PIO != 0 {
            IoSpace::Port
        } else {
            IoSpace::Memory
        };
        let new = IoEventFd {
            event: Registered::new(request.fd)?,
            space,
            address: request.addr,
            length: request.len,
            datamatch: (request.flags & DATAMATCH != 0).then_some(request.datamatch),
        };
        let _update = self.update.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::clone(&self.all.load());
        if request.flags & DEASSIGN != 0 {
            let same = |old: &IoEventFd| {
                old.event.identity == new.event.identity
                    && (old.space, old.address, old.length, old.datamatch)
                        == (new.space, new.address, new.length, new.datamatch)
            };
            let Some(index) = all.iter().position(|old| same(old)) else {
                return fail(libc::ENOENT);
            };
            all.remove(index);
        } else {
            if all.iter().any(|old| old.collides(&new)) {
                return fail(libc::EEXIST);
            }
            all.push(Arc::new(new));
        }
        self.is_used.store(true, Ordering::Relaxed);
        self.all.store(Arc::new(all));
        Ok(())
    }

    fn registered(&self) -> Option<arc_swap::Guard<Arc<Vec<Arc<IoEventFd>>>>> {
        self.is_used
            .load(Ordering::Relaxed)
            .then(|| self.all.load())
    }

    /// Whether some ioeventfd is at an address.
    pub fn concerns(&self, space: IoSpace, address: u64) -> bool {
        let at = |event: &Arc<IoEventFd>| event.space == space && event.address == address;
        self.registered().is_some_and(|all| all.iter().any(at))
    }

    /// Signals the ioeventfd that a write matches; false if none does.
    pub fn signal(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        let Some(all) = self.registered() else {
            return false;
        };
        match all.iter().find(|event| event.matches(space, address, data)) {
            Some(event) => {
                event.event.signal();
                true
            }
            None => false,
        }
    }

    /// Signals the zero-length ioeventfd at a memory address, whatever is written there; false if
    /// there is none. This is the fast MMIO bus: no instruction is looked at.
    pub fn signal_fast(&self, gpa: u64) -> bool {
        let Some(all) = self.registered() else {
            return false;
        };
        let fast = |event: &&Arc<IoEventFd>| {
            event.length == 0 && event.space == IoSpace::Memory && event.address == gpa
        };
        match all.iter().find(fast) {
            Some(event) => {
                event.event.signal();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::Model;
    use crate::irqchip::apics::Apics;
    use crate::irqchip::lapic::{ApicConfig, LocalApic, reg};
    use crate::mailbox::tests::mailbox;
    use crate::timers::Timers;
    use rustix::fd::AsRawFd;
    use std::time::{Duration, Instant};

    fn new_eventfd() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(fd, &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }

    fn until(condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn machine() -> (Arc<IrqChip>, Arc<LocalApic>) {
        let apics = Arc::new(Apics::default());
        let config = ApicConfig {
            wide_ids: false,
            directed_eoi: false,
            lint0_enabled: true,
        };
        let apic = LocalApic::new(0, true, config, mailbox(), &Timers::new());
        apic.write(reg::SVR, 0x1ff).unwrap();
        apics.add(apic.clone());
        let chip = IrqChip::new(Model::Full, apics);
        chip.write_ioapic(0xfec0_0000, 0x10 + 2 * 5);
        chip.write_ioapic(0xfec0_0010, 0x8045);
        chip.write_ioapic(0xfec0_0000, 0x10 + 2 * 6);
        chip.write_ioapic(0xfec0_0010, 0x46);
        (chip, apic)
    }

    #[test]
    fn an_irqfd_is_an_edge_and_survives_its_descriptor() {
        let (chip, apic) = machine();
        let irqfds = IrqFds::default();
        let event = new_eventfd();
        let fd = event.as_raw_fd() as u32;
        irqfds
            .apply(
                &kvm_irqfd {
                    fd,
                    gsi: 6,
                    ..Default::default()
                },
                &chip,
            )
            .unwrap();
        let busy = irqfds.apply(
            &kvm_irqfd {
                fd,
                gsi: 7,
                ..Default::default()
            },
            &chip,
        );
        assert_eq!(busy.unwrap_err().errno(), libc::EBUSY);
        let copy = rustix::io::dup(&event).unwrap();
        drop(event);
        rustix::io::write(&copy, &1u64.to_ne_bytes()).unwrap();
        until(|| apic.deliverable() == Some(0x46));
    }

    #[test]
    fn resampling_lowers_the_line_and_tells_the_device() {
        let (chip, apic) = machine();
        let irqfds = IrqFds::default();
        let (event, resample) = (new_eventfd(), new_eventfd());
        let request = kvm_irqfd {
            fd: event.as_raw_fd() as u32,
            gsi: 5,
            flags: KVM_IRQFD_FLAG_RESAMPLE,
            resamplefd: resample.as_raw_fd() as u32,
            ..Default::default()
        };
        irqfds.apply(&request, &chip).unwrap();
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        until(|| apic.deliverable() == Some(0x45));
        apic.acknowledge();
        chip.apply(apic.end_of_interrupt(), &apic);
        assert_eq!(count(&resample), 1);
        assert_eq!(apic.deliverable(), None);
        irqfds
            .apply(
                &kvm_irqfd {
                    flags: KVM_IRQFD_FLAG_DEASSIGN,
                    ..request
                },
                &chip,
            )
            .unwrap();
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(apic.deliverable(), None);
    }

    #[test]
    fn bad_descriptors() {
        let (chip, _apic) = machine();
        let irqfds = IrqFds::default();
        let bad = irqfds.apply(
            &kvm_irqfd {
                fd: 9999,
                ..Default::default()
            },
            &chip,
        );
        assert_eq!(bad.unwrap_err().errno(), libc::EBADF);
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        let fd = file.as_raw_fd() as u32;
        let bad = irqfds.apply(
            &kvm_irqfd {
                fd,
                ..Default::default()
            },
            &chip,
        );
        assert_eq!(bad.unwrap_err().errno(), libc::EINVAL);
        let bad = irqfds.apply(
            &kvm_irqfd {
                flags: 8,
                ..Default::default()
            },
            &chip,
        );
        assert_eq!(bad.unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn doorbells_match_as_registered() {
        let events = IoEventFds::default();
        let (any, one) = (new_eventfd(), new_eventfd());
        let base = kvm_ioeventfd {
            addr: 0x1000,
            len: 4,
            ..Default::default()
        };
        let exact = kvm_ioeventfd {
            fd: one.as_raw_fd(),
            flags: 1,
            datamatch: 7,
            ..base
        };
        events.apply(&exact).unwrap();
        let clash = kvm_ioeventfd {
            fd: any.as_raw_fd(),
            ..base
        };
        assert_eq!(events.apply(&clash).unwrap_err().errno(), libc::EEXIST);
        let wide = kvm_ioeventfd {
            addr: 0x2000,
            len: 0,
            fd: any.as_raw_fd(),
            ..base
        };
        events.apply(&wide).unwrap();
        assert!(!events.signal(IoSpace::Memory, 0x1000, &[8, 0, 0, 0]));
        assert!(!events.signal(IoSpace::Memory, 0x1000, &[7, 0]));
        assert!(!events.signal(IoSpace::Port, 0x1000, &[7, 0, 0, 0]));
        assert!(events.signal(IoSpace::Memory, 0x1000, &[7, 0, 0, 0]));
        assert_eq!(count(&one), 1);
        assert!(events.signal(IoSpace::Memory, 0x2000, &[1]));
        assert!(events.signal_fast(0x2000) && !events.signal_fast(0x1000));
        assert_eq!(count(&any), 2);
        events
            .apply(&kvm_ioeventfd {
                flags: 1 | 4,
                ..exact
            })
            .unwrap();
        let gone = events.apply(&kvm_ioeventfd {
            flags: 1 | 4,
            ..exact
        });
        assert_eq!(gone.unwrap_err().errno(), libc::ENOENT);
        let odd = kvm_ioeventfd { len: 3, ..exact };
        assert_eq!(events.apply(&odd).unwrap_err().errno(), libc::EINVAL);
    }
}
