//! PCI configuration mechanism 1 with a host bridge and nothing behind it.
//!
//! Stock kernels report an error when they find no way to reach PCI configuration space. This is
//! the least that says "there is a bus, and it is empty".

use crate::machine::bus::Device;

const ENABLE: u32 = 1 << 31;
/// Vendor 0x8086, device 0x0d57; class 06.00 (host bridge).
const HOST_BRIDGE_ID: u32 = 0x0d57_8086;
const HOST_BRIDGE_CLASS: u32 = 0x0600_0000;

/// Ports 0xcf8 to 0xcff.
#[derive(Default)]
pub(crate) struct PciConfig {
    address: u32,
}

impl PciConfig {
    fn data(&self) -> u32 {
        let (function, register) = (self.address >> 8 & 0xff_ffff, self.address & 0xfc);
        if self.address & ENABLE == 0 || function & 0xffff != 0 {
            return u32::MAX;
        }
        match register {
            0 => HOST_BRIDGE_ID,
            8 => HOST_BRIDGE_CLASS,
            _ => 0,
        }
    }
}

impl Device for PciConfig {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut registers = [0; 8];
        registers[..4].copy_from_slice(&self.address.to_le_bytes());
        registers[4..].copy_from_slice(&self.data().to_le_bytes());
        // Configuration mechanism 1 exists only for whole double words at the address port.
        if offset < 4 && data.len() != 4 {
            registers[..4].fill(0xff);
        }
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(bytes)) = (offset, data.try_into()) {
            self.address = u32::from_le_bytes(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_read(address: u32) -> u32 {
        let mut device = PciConfig::default();
        device.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        device.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_host_bridge_is_alone() {
        assert_eq!(config_read(0x8000_0000), HOST_BRIDGE_ID);
        assert_eq!(config_read(0x8000_0008), HOST_BRIDGE_CLASS);
        assert_eq!(config_read(0x8000_0800), u32::MAX);
        assert_eq!(config_read(0x8001_0000), u32::MAX);
        assert_eq!(config_read(0x0000_0000), u32::MAX);
    }

    #[test]
    fn the_address_register_reads_back_as_a_double_word_only() {
        let mut device = PciConfig::default();
        device.write(0, &0x8000_0000u32.to_le_bytes());
        let mut whole = [0; 4];
        device.read(0, &mut whole);
        assert_eq!(u32::from_le_bytes(whole), 0x8000_0000);
        let mut byte = [0; 1];
        device.read(0, &mut byte);
        assert_eq!(byte, [0xff]);
    }
}
