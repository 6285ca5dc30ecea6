//! A thread that waits for events and serves them: queue notifications and signals.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::outcome::{Outcome, Stop};

/// Serves one event source; called when its descriptor is readable.
pub(crate) type Handler = Box<dyn FnMut() + Send>;

/// Event sources and what serves them, until the machine stops.
pub(crate) struct EventLoop {
    epoll: Epoll,
    handlers: Vec<Handler>,
    stop: Stop,
}

/// Token of the stop event; handlers are numbered from zero.
const STOP: u64 = u64::MAX;

impl EventLoop {
    /// A loop that ends when `stop` is requested.
    pub(crate) fn new(stop: Stop) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, stop.event().as_raw_fd(), event)?;
        Ok(Self {
            epoll,
            handlers: Vec::new(),
            stop,
        })
    }

    /// Serves `descriptor` with `handler`, which must make it unreadable again.
    pub(crate) fn add(&mut self, descriptor: RawFd, handler: Handler) -> io::Result<()> {
        let token = self.handlers.len() as u64;
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll.ctl(ControlOperation::Add, descriptor, event)?;
        self.handlers.push(handler);
        Ok(())
    }

    /// Has the machine stopped after `time`.
    pub(crate) fn add_timeout(&mut self, time: Duration, stop: Stop) -> io::Result<()> {
        let failed = |error: vmm_sys_util::errno::Error| io::Error::from(error);
        let mut timer = TimerFd::new().map_err(failed)?;
        // A timer that is set to zero is off.
        let first = time.max(Duration::from_nanos(1));
        timer.reset(first, None).map_err(failed)?;
        let descriptor = timer.as_raw_fd();
        let handler = move || {
            let _ = timer.wait();
            stop.request(Outcome::Timeout(time));
        };
        self.add(descriptor, Box::new(handler))
    }

    /// Serves events until the machine stops.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        while self.stop.outcome().is_none() {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                if let Some(handler) = self.handlers.get_mut(event.data() as usize) {
                    handler();
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn events_are_served_until_the_stop() {
        let stop = Stop::new().unwrap();
        let served = Arc::new(AtomicU64::new(0));
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let source = event.try_clone().unwrap();
        let mut events = EventLoop::new(stop.clone()).unwrap();
        events
            .add(event.as_raw_fd(), {
                let served = served.clone();
                Box::new(move || {
                    served.fetch_add(event.read().unwrap(), Ordering::SeqCst);
                    stop.request(Outcome::Quit);
                })
            })
            .unwrap();
        source.write(3).unwrap();
        events.run().unwrap();
        assert_eq!(served.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn time_passes() {
        for time in [Duration::ZERO, Duration::from_millis(5)] {
            let stop = Stop::new().unwrap();
            let mut events = EventLoop::new(stop.clone()).unwrap();
            events.add_timeout(time, stop.clone()).unwrap();
            events.run().unwrap();
            assert_eq!(stop.outcome(), Some(Outcome::Timeout(time)));
        }
    }
}
