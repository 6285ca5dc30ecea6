//! Virtio console: one port, the terminal behind it (`hvc0` in Linux).

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{Queue, QueueT};

use super::{Chain, QueueError, VirtioDevice, serve_all};
use crate::machine::memory::GuestMemory;

/// The queue with buffers for what was typed.
pub(crate) const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CHUNK: usize = 4096;

/// What was typed and not yet taken by the guest.
#[derive(Clone, Default)]
pub(crate) struct Pending(Arc<Mutex<VecDeque<u8>>>);

impl Pending {
    /// Adds input; the receive queue must be served afterwards.
    pub(crate) fn push(&self, input: &[u8]) {
        self.lock().extend(input);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// The device.
pub(crate) struct Console {
    pending: Pending,
    output: Box<dyn Write + Send>,
}

impl Console {
    /// A console that reads `pending` and writes `output`.
    pub(crate) fn new(pending: Pending, output: Box<dyn Write + Send>) -> Self {
        Self { pending, output }
    }

    fn receive(&self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), QueueError> {
        let mut pending = self.pending.lock();
        while !pending.is_empty() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                return Ok(());
            };
            let head = chain.head_index();
            let written = fill(chain, memory, &mut pending);
            queue.add_used(memory, head, written)?;
        }
        Ok(())
    }

    fn transmit(&mut self, chain: Chain<'_>, memory: &GuestMemory) -> u32 {
        if let Ok(mut reader) = chain.reader(memory) {
            let mut chunk = [0; CHUNK];
            while let Ok(count @ 1..) = reader.read(&mut chunk) {
                if self.output.write_all(&chunk[..count]).is_err() {
                    break;
                }
            }
            // A console has no way to report that its other end is gone.
            let _ = self.output.flush();
        }
        0
    }
}

fn fill(chain: Chain<'_>, memory: &GuestMemory, pending: &mut VecDeque<u8>) -> u32 {
    let Ok(mut writer) = chain.writer(memory) else {
        return 0;
    };
    let count = writer.available_bytes().min(pending.len());
    let bytes: Vec<u8> = pending.drain(..count).collect();
    match writer.write_all(&bytes) {
        Ok(()) => count as u32,
        Err(_) => 0,
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_console_config, valid only with features that are not offered.
        vec![0; 12]
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<(), QueueError> {
        match index {
            RECEIVE => self.receive(queue, memory),
            TRANSMIT => serve_all(queue, memory, |chain| self.transmit(chain, memory)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::testing::{Buffer, Driver};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Driver, Pending, Sink) {
        let (pending, sink) = (Pending::default(), Sink::default());
        let console = Console::new(pending.clone(), Box::new(sink.clone()));
        (Driver::new(Box::new(console)), pending, sink)
    }

    #[test]
    fn output_reaches_the_terminal() {
        let (mut driver, _, sink) = console();
        driver.request(
            1,
            &[Buffer::Readable(b"hello, "), Buffer::Readable(b"host")],
        );
        assert_eq!(*sink.0.lock().unwrap(), b"hello, host");
    }

    #[test]
    fn input_fills_the_buffers_that_the_guest_offers() {
        let (mut driver, pending, _) = console();
        pending.push(b"abcdef");
        let (buffers, length) = driver.request(0, &[Buffer::Writable(4)]);
        assert_eq!((&buffers[0][..], length), (&b"abcd"[..], 4));
        let (buffers, length) = driver.request(0, &[Buffer::Writable(4)]);
        assert_eq!((&buffers[0][..2], length), (&b"ef"[..], 2));
        assert_eq!(driver.request(0, &[Buffer::Writable(4)]).1, 0);
    }
}
