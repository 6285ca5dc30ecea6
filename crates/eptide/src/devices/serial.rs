//! The 16550 serial port: `vm-superio`'s register model, the terminal on one side, an eventfd for
//! the interrupt line on the other.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::bus::Device;

/// Raises the interrupt line.
pub(crate) struct Line(pub(crate) EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes whoever waits for room in the receive FIFO.
#[derive(Clone, Default)]
struct Drained(Arc<Condvar>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.notify_all();
    }
}

type Uart = Serial<Line, Drained, Box<dyn Write + Send>>;

/// A serial port shared between the bus and the input thread.
#[derive(Clone)]
pub(crate) struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    drained: Drained,
}

impl SerialPort {
    /// A port that writes to `output` and raises `line`.
    pub(crate) fn new(line: Line, output: Box<dyn Write + Send>) -> Self {
        let drained = Drained::default();
        let uart = Serial::with_events(line, drained.clone(), output);
        Self {
            uart: Arc::new(Mutex::new(uart)),
            drained,
        }
    }

    /// Puts `input` into the receive FIFO, waiting for the guest to take what does not fit.
    pub(crate) fn receive(&self, mut input: &[u8]) {
        let mut uart = self.lock();
        while !input.is_empty() {
            if uart.fifo_capacity() == 0 {
                uart = self
                    .drained
                    .0
                    .wait(uart)
                    .unwrap_or_else(|poison| poison.into_inner());
                continue;
            }
            match uart.enqueue_raw_bytes(input) {
                // Zero bytes taken: the port is in loopback mode and a person's typing is lost.
                Ok(0) => return,
                Ok(taken) => input = &input[taken..],
                Err(error) => {
                    tracing::warn!(?error, "serial input lost");
                    return;
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart> {
        // A poisoned lock means another thread panicked; the machine is stopping and the port's
        // registers are still consistent bytes.
        self.uart
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Device for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock();
        for byte in data {
            *byte = uart.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut uart = self.lock();
        for byte in data {
            if let Err(error) = uart.write(offset as u8, *byte) {
                tracing::debug!(?error, "serial output lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialPort, Sink, EventFd) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let sink = Sink::default();
        let port = SerialPort::new(Line(line.try_clone().unwrap()), Box::new(sink.clone()));
        (port, sink, line)
    }

    #[test]
    fn bytes_written_appear_and_raise_no_line_while_interrupts_are_off() {
        let (mut port, sink, line) = port();
        port.write(0, b"ok");
        assert_eq!(*sink.0.lock().unwrap(), b"ok");
        assert!(line.read().is_err());
    }

    #[test]
    fn input_beyond_the_fifo_waits_for_the_guest() {
        let (mut port, _, line) = port();
        port.write(1, &[1]); // interrupt on received data
        let typed: Vec<u8> = (0..200).collect();
        let sender = std::thread::spawn({
            let (port, typed) = (port.clone(), typed.clone());
            move || port.receive(&typed)
        });
        let mut received = Vec::new();
        while received.len() < typed.len() {
            let mut status = [0];
            port.read(5, &mut status);
            if status[0] & 1 != 0 {
                let mut byte = [0];
                port.read(0, &mut byte);
                received.push(byte[0]);
            }
        }
        sender.join().unwrap();
        assert_eq!(received, typed);
        assert!(line.read().is_ok());
    }
}
