//! Ports and MMIO windows: which device an address belongs to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A device's registers as the processor sees them.
pub(crate) trait Device: Send {
    /// Fills `data` from the register at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several threads reach.
pub(crate) type SharedDevice = Arc<Mutex<dyn Device>>;

/// A window overlaps another one.
#[derive(Debug, thiserror::Error)]
#[error("device window {start:#x}+{length:#x} overlaps another one")]
pub(crate) struct Overlap {
    start: u64,
    length: u64,
}

/// One address space of devices.
#[derive(Default)]
pub(crate) struct Bus {
    windows: BTreeMap<u64, (u64, SharedDevice)>,
}

impl Bus {
    /// Puts `device` at `start`.
    pub(crate) fn insert(
        &mut self,
        start: u64,
        length: u64,
        device: SharedDevice,
    ) -> Result<(), Overlap> {
        let last = start + (length - 1);
        let before = self.windows.range(..=last).next_back();
        if before.is_some_and(|(other, (size, _))| other + size > start) {
            return Err(Overlap { start, length });
        }
        self.windows.insert(start, (length, device));
        Ok(())
    }

    /// Reads; an address without a device floats high, as on a PC.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; an address without a device swallows the data.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            lock(device).write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &SharedDevice)> {
        let (start, (length, device)) = self.windows.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *length).then_some((offset, device))
    }
}

fn lock(device: &SharedDevice) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
    // A device that panicked has already stopped the machine; what it says no longer matters.
    device.lock().unwrap_or_else(|poison| poison.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Echo {
        last: u64,
    }

    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, _data: &[u8]) {
            self.last = offset;
        }
    }

    #[test]
    fn addresses_find_their_device() {
        let mut bus = Bus::default();
        let echo = Arc::new(Mutex::new(Echo::default()));
        bus.insert(0x100, 8, echo.clone()).unwrap();
        let read = |address| {
            let mut data = [0];
            bus.read(address, &mut data);
            data[0]
        };
        assert_eq!(
            [read(0xff), read(0x100), read(0x107), read(0x108)],
            [0xff, 0, 7, 0xff]
        );
        bus.write(0x105, &[1]);
        bus.write(0x200, &[1]);
        assert_eq!(echo.lock().unwrap().last, 5);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Echo::default()));
        bus.insert(0x100, 8, device()).unwrap();
        for (start, length) in [(0x100, 1), (0x107, 1), (0xf8, 9), (0x80, 0x200)] {
            assert!(bus.insert(start, length, device()).is_err(), "{start:#x}");
        }
        bus.insert(0x108, 1, device()).unwrap();
        bus.insert(0xff, 1, device()).unwrap();
    }
}
