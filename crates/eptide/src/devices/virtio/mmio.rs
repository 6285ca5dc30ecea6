//! The virtio-mmio register window (version 2 of the specification's "Virtio Over MMIO").

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use crate::machine::bus::Device;
use crate::machine::memory::GuestMemory;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"EPTD");
/// Interrupt cause: a queue has used buffers.
const USED_BUFFER: u32 = 1;
/// Interrupt cause: configuration or status changed.
const CONFIG_CHANGE: u32 = 2;

/// Offset of the notification register, which ioeventfds replace.
pub(crate) const NOTIFY_OFFSET: u64 = register::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// A device behind its register window.
pub(crate) struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: EventFd,
    queues: Vec<Queue>,
    status: u32,
    cause: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: usize,
}

/// The window as the bus, the event loop and input threads share it.
pub(crate) type SharedTransport = Arc<Mutex<MmioTransport>>;

impl MmioTransport {
    /// Puts `device` behind a window that raises `interrupt`.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: EventFd,
    ) -> Result<Self, virtio_queue::Error> {
        let sizes = device.queue_sizes();
        let queues = sizes
            .iter()
            .map(|size| Queue::new(*size))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt,
            queues,
            status: 0,
            cause: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// How many queues the device has.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Serves queue `index`, as after a notification.
    pub(crate) fn notify(&mut self, index: usize) {
        let running = VIRTIO_CONFIG_S_DRIVER_OK;
        let broken = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        if self.status & (running | broken) != running {
            return;
        }
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        if !queue.ready() || !queue.is_valid(&self.memory) {
            return;
        }
        let served = self.device.process(index, queue, &self.memory);
        match served.and_then(|()| queue.needs_notification(&self.memory)) {
            Ok(true) => self.raise(USED_BUFFER),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(?error, queue = index, "the driver's queue is broken");
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                self.raise(CONFIG_CHANGE);
            }
        }
    }

    fn raise(&mut self, cause: u32) {
        self.cause |= cause;
        // The counter cannot overflow before KVM has taken the interrupt.
        let _ = self.interrupt.write(1);
    }

    fn offered(&self) -> u64 {
        let queue = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | queue
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected()
                .map_or(0, |queue| u32::from(queue.max_size())),
            register::VIRTIO_MMIO_QUEUE_READY => {
                self.selected().map_or(0, |queue| u32::from(queue.ready()))
            }
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.cause,
            register::VIRTIO_MMIO_STATUS => self.status,
            // Shared memory regions: a length of all ones says there is none.
            0xb0..=0xbc => u32::MAX,
            // The configuration never changes while a driver looks, so its generation is constant.
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            register::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value as usize,
            register::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value as usize),
            register::VIRTIO_MMIO_INTERRUPT_ACK => self.cause &= !value,
            register::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        let negotiating = VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        if self.status & negotiating != VIRTIO_CONFIG_S_DRIVER {
            return;
        }
        let kept = |shift: u32| self.driver_features & !(u64::from(u32::MAX) << shift);
        self.driver_features = match self.driver_features_select {
            0 => kept(0) | u64::from(value),
            1 => kept(32) | u64::from(value) << 32,
            _ => return,
        };
    }

    /// Queues are configured between FEATURES_OK and DRIVER_OK.
    fn write_queue_register(&mut self, offset: u32, value: u32) {
        let configuring = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if self.status & configuring != VIRTIO_CONFIG_S_FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select) else {
            return;
        };
        match offset {
            register::VIRTIO_MMIO_QUEUE_NUM => {
                queue.set_size(u16::try_from(value).unwrap_or(u16::MAX));
            }
            register::VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.set_desc_table_address(None, Some(value));
            }
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                queue.set_avail_ring_address(Some(value), None);
            }
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.set_avail_ring_address(None, Some(value));
            }
            register::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                queue.set_used_ring_address(None, Some(value));
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        const ORDER: [u32; 4] = [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ];
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        for (step, bit) in ORDER.iter().enumerate() {
            let before: u32 = ORDER[..step].iter().sum();
            if added & bit == 0 {
                continue;
            }
            if self.status & before != before {
                return;
            }
            if *bit == VIRTIO_CONFIG_S_FEATURES_OK && !self.accept_features() {
                // Left clear: the driver reads it back and gives up.
                return;
            }
            self.status |= bit;
        }
        self.status |= value & VIRTIO_CONFIG_S_FAILED;
    }

    fn accept_features(&mut self) -> bool {
        let wanted = self.driver_features;
        let version_1 = wanted & 1 << VIRTIO_F_VERSION_1 != 0;
        if !version_1 || wanted & !self.offered() != 0 {
            return false;
        }
        for queue in &mut self.queues {
            queue.set_event_idx(wanted & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        true
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.cause = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }
}

impl Device for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= u64::from(register::VIRTIO_MMIO_CONFIG) {
            let config = self.device.config();
            let from = (offset - u64::from(register::VIRTIO_MMIO_CONFIG)) as usize;
            for (byte, value) in data.iter_mut().zip(config.iter().skip(from)) {
                *byte = *value;
            }
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device here has a configuration field that drivers write.
        if offset < u64::from(register::VIRTIO_MMIO_CONFIG)
            && let Ok(bytes) = data.try_into()
        {
            self.write_register(offset as u32, u32::from_le_bytes(bytes));
        }
    }
}

/// A driver and its rings in fake guest memory, for the tests of all devices.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::machine::memory;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor as SplitDescriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    /// Descriptor flag: the device writes.
    const WRITE: u16 = 2;
    /// Where a request's buffers start; ring structures lie below.
    const BUFFERS: u64 = 0x10_0000;

    /// One buffer of a request.
    pub(crate) enum Buffer<'a> {
        /// For the device to read.
        Readable(&'a [u8]),
        /// For the device to write, of this length.
        Writable(usize),
    }

    /// A transport with an initialised driver.
    pub(crate) struct Driver {
        pub(crate) transport: MmioTransport,
        pub(crate) memory: GuestMemory,
        pub(crate) interrupt: EventFd,
    }

    impl Driver {
        pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
            let memory = memory::allocate(4 << 20).unwrap();
            let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let line = interrupt.try_clone().unwrap();
            let transport = MmioTransport::new(device, memory.clone(), line).unwrap();
            Self {
                transport,
                memory,
                interrupt,
            }
        }

        pub(crate) fn read(&mut self, offset: u32) -> u32 {
            let mut data = [0; 4];
            self.transport.read(u64::from(offset), &mut data);
            u32::from_le_bytes(data)
        }

        pub(crate) fn write(&mut self, offset: u32, value: u32) {
            self.transport
                .write(u64::from(offset), &value.to_le_bytes());
        }

        /// Initialises the device with queue `index` at a fixed place.
        pub(crate) fn start(&mut self, index: u32, size: u16) {
            let address = self.rings(size).desc_table_addr().0;
            let (avail, used) = {
                let rings = self.rings(size);
                (rings.avail_addr().0, rings.used_addr().0)
            };
            self.write(register::VIRTIO_MMIO_STATUS, 0);
            self.write(register::VIRTIO_MMIO_STATUS, 1);
            self.write(register::VIRTIO_MMIO_STATUS, 3);
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
            self.write(register::VIRTIO_MMIO_STATUS, 11);
            self.write(register::VIRTIO_MMIO_QUEUE_SEL, index);
            self.write(register::VIRTIO_MMIO_QUEUE_NUM, u32::from(size));
            self.write(register::VIRTIO_MMIO_QUEUE_DESC_LOW, address as u32);
            self.write(register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail as u32);
            self.write(register::VIRTIO_MMIO_QUEUE_USED_LOW, used as u32);
            self.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
            self.write(register::VIRTIO_MMIO_STATUS, 15);
            assert_eq!(self.read(register::VIRTIO_MMIO_STATUS), 15);
        }

        fn rings(&self, size: u16) -> MockSplitQueue<'_, GuestMemory> {
            MockSplitQueue::create(&self.memory, GuestAddress(0x1000), size)
        }

        /// Sends one request through a fresh queue `index`; returns the bytes of each writable
        /// buffer and the length that the device reported.
        pub(crate) fn request(
            &mut self,
            index: u32,
            buffers: &[Buffer<'_>],
        ) -> (Vec<Vec<u8>>, u32) {
            const SIZE: u16 = 16;
            self.start(index, SIZE);
            let mut at = BUFFERS;
            let mut descriptors = Vec::new();
            let mut writable = Vec::new();
            for buffer in buffers {
                let (length, flags) = match buffer {
                    Buffer::Readable(bytes) => {
                        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
                        (bytes.len(), 0)
                    }
                    Buffer::Writable(length) => {
                        writable.push((at, *length));
                        (*length, WRITE)
                    }
                };
                let descriptor = SplitDescriptor::new(at, length as u32, flags, 0);
                descriptors.push(RawDescriptor::from(descriptor));
                at += length.next_multiple_of(4096) as u64;
            }
            let used = {
                let rings = self.rings(SIZE);
                rings.build_desc_chain(&descriptors).unwrap();
                rings.used_addr()
            };
            self.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, index);
            let count: u16 = self.memory.read_obj(used.unchecked_add_two()).unwrap();
            let length = match count {
                0 => 0,
                _ => self.memory.read_obj(GuestAddress(used.0 + 8)).unwrap(),
            };
            let read = |(address, length): &(u64, usize)| {
                let mut bytes = vec![0; *length];
                self.memory
                    .read_slice(&mut bytes, GuestAddress(*address))
                    .unwrap();
                bytes
            };
            (writable.iter().map(read).collect(), length)
        }
    }

    trait UsedIndex {
        fn unchecked_add_two(self) -> GuestAddress;
    }

    impl UsedIndex for GuestAddress {
        fn unchecked_add_two(self) -> GuestAddress {
            GuestAddress(self.0 + 2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Buffer, Driver};
    use super::*;
    use crate::devices::virtio::entropy::Entropy;

    fn driver() -> Driver {
        Driver::new(Box::new(Entropy))
    }

    #[test]
    fn the_window_identifies_itself() {
        let mut driver = driver();
        assert_eq!(driver.read(0), MAGIC);
        assert_eq!(
            [driver.read(4), driver.read(8), driver.read(0x34)],
            [2, 4, 256]
        );
        assert_eq!(driver.read(0x104), 0);
    }

    #[test]
    fn status_steps_must_be_taken_in_order() {
        let mut driver = driver();
        driver.write(register::VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_DRIVER_OK);
        assert_eq!(driver.read(register::VIRTIO_MMIO_STATUS), 0);
        driver.write(register::VIRTIO_MMIO_STATUS, 3);
        // VERSION_1 has not been accepted by the driver.
        driver.write(register::VIRTIO_MMIO_STATUS, 11);
        assert_eq!(driver.read(register::VIRTIO_MMIO_STATUS), 3);
    }

    #[test]
    fn features_not_offered_are_not_accepted() {
        let mut driver = driver();
        driver.write(register::VIRTIO_MMIO_STATUS, 3);
        driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 3);
        driver.write(register::VIRTIO_MMIO_STATUS, 11);
        assert_eq!(driver.read(register::VIRTIO_MMIO_STATUS), 3);
    }

    #[test]
    fn a_used_buffer_raises_the_line_and_is_acknowledged() {
        let mut driver = driver();
        driver.request(0, &[Buffer::Writable(8)]);
        assert_eq!(driver.interrupt.read().unwrap(), 1);
        assert_eq!(
            driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS),
            USED_BUFFER
        );
        driver.write(register::VIRTIO_MMIO_INTERRUPT_ACK, USED_BUFFER);
        assert_eq!(driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }

    #[test]
    fn reset_forgets_the_queues() {
        let mut driver = driver();
        driver.start(0, 16);
        assert_eq!(driver.read(register::VIRTIO_MMIO_QUEUE_READY), 1);
        driver.write(register::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
        driver.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        driver.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, 77);
        assert!(driver.interrupt.read().is_err());
    }

    #[test]
    fn rings_outside_memory_are_ignored() {
        let mut driver = driver();
        driver.start(0, 16);
        driver.write(register::VIRTIO_MMIO_STATUS, 0);
        driver.write(register::VIRTIO_MMIO_STATUS, 3);
        driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        driver.write(register::VIRTIO_MMIO_STATUS, 11);
        driver.write(register::VIRTIO_MMIO_QUEUE_NUM, 16);
        driver.write(register::VIRTIO_MMIO_QUEUE_DESC_HIGH, 0xffff_ffff);
        driver.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.write(register::VIRTIO_MMIO_STATUS, 15);
        driver.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert!(driver.interrupt.read().is_err());
    }
}
