//! Virtio devices over the MMIO transport, split virtqueues, virtio 1.x only.
//!
//! `mmio` is the register window, the same for all; `block`, `console` and `entropy` are what lies
//! behind it. Whatever a driver puts into a queue is untrusted: addresses are checked by
//! `vm-memory`, ring arithmetic by `virtio-queue`, and a malformed request is answered with an
//! error, never with a panic.

pub(crate) mod block;
pub(crate) mod console;
pub(crate) mod entropy;
pub(crate) mod mmio;

use virtio_queue::{DescriptorChain, Queue, QueueT};

use crate::machine::memory::GuestMemory;

/// A driver's queue is broken beyond what a request's status can say.
pub(crate) type QueueError = virtio_queue::Error;

/// One request.
pub(crate) type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// What a device is, apart from how it is reached.
pub(crate) trait VirtioDevice: Send {
    /// The device number of the virtio specification.
    fn id(&self) -> u32;

    /// Features offered, beyond those of the transport and the queues.
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Serves what is in queue `index`.
    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<(), QueueError>;
}

/// Answers every request in `queue`; `serve` returns how many bytes it wrote into the request.
fn serve_all(
    queue: &mut Queue,
    memory: &GuestMemory,
    mut serve: impl FnMut(Chain<'_>) -> u32,
) -> Result<(), QueueError> {
    loop {
        queue.disable_notification(memory)?;
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let written = serve(chain);
            queue.add_used(memory, head, written)?;
        }
        // A request that came between the last look and this call would go unnoticed.
        if !queue.enable_notification(memory)? {
            return Ok(());
        }
    }
}
