//! Virtio entropy: the host's random bytes for the guest.

use std::io::Write;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;

use super::{Chain, QueueError, VirtioDevice, serve_all};
use crate::machine::memory::GuestMemory;

/// Most bytes given out for one request, so that a driver cannot keep the host busy.
const REQUEST_MAX: usize = 64 * 1024;

/// The device; it has no state.
pub(crate) struct Entropy;

impl VirtioDevice for Entropy {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn process(
        &mut self,
        _index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<(), QueueError> {
        serve_all(queue, memory, |chain| fill(chain, memory))
    }
}

fn fill(chain: Chain<'_>, memory: &GuestMemory) -> u32 {
    let Ok(mut writer) = chain.writer(memory) else {
        return 0;
    };
    let mut bytes = vec![0; writer.available_bytes().min(REQUEST_MAX)];
    // SAFETY: the pointer and length are those of a live, exclusively borrowed buffer.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    bytes.truncate(usize::try_from(got).unwrap_or(0));
    match writer.write_all(&bytes) {
        Ok(()) => bytes.len() as u32,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::testing::{Buffer, Driver};

    #[test]
    fn requests_are_filled_with_random_bytes() {
        let mut driver = Driver::new(Box::new(Entropy));
        let (buffers, length) = driver.request(0, &[Buffer::Writable(64), Buffer::Writable(64)]);
        assert_eq!(length, 128);
        assert_ne!(buffers[0], buffers[1]);
        assert!(
            buffers
                .iter()
                .all(|bytes| bytes.iter().any(|byte| *byte != 0))
        );
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut driver = Driver::new(Box::new(Entropy));
        assert_eq!(driver.request(0, &[Buffer::Readable(b"x")]).1, 0);
    }
}
