//! What the console shows on its way to the terminal: milestones, a panic, the last lines.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Linux prints this when it starts the first user program.
const INIT_MARKER: &str = "Run /init as init process";
/// Linux prints this, and why, when it panics.
const PANIC_MARKER: &str = "Kernel panic - not syncing";
/// Longest part of a line that is looked at.
const LINE_MAX: usize = 1024;
/// Lines that are remembered.
const LAST_LINES: usize = 10;

/// What was seen; shared by all consoles of a machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    start: Option<Instant>,
    init: Option<Instant>,
    panic: Option<String>,
    last: VecDeque<String>,
    /// The line that has not ended yet, of each console.
    unfinished: Vec<Vec<u8>>,
}

impl Watch {
    /// The first instruction is about to run.
    pub(crate) fn start(&self) {
        self.seen().start = Some(Instant::now());
    }

    /// From the first instruction to the first user program.
    pub(crate) fn time_to_init(&self) -> Option<Duration> {
        let seen = self.seen();
        Some(seen.init?.duration_since(seen.start?))
    }

    /// The kernel's first words about a panic.
    pub(crate) fn panic(&self) -> Option<String> {
        self.seen().panic.clone()
    }

    /// The last lines that hold something, those that have not ended behind the others.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        let seen = self.seen();
        let unfinished = seen.unfinished.iter().filter_map(|line| text_of(line));
        seen.last.iter().cloned().chain(unfinished).collect()
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// A line as text, unless there is nothing on it.
fn text_of(line: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.to_owned())
}

impl Seen {
    fn look(&mut self, console: usize, bytes: &[u8]) {
        for byte in bytes {
            let line = &mut self.unfinished[console];
            match byte {
                b'\n' => {
                    let line = std::mem::take(line);
                    if let Some(text) = text_of(&line) {
                        self.line(text);
                    }
                }
                _ if line.len() < LINE_MAX => line.push(*byte),
                _ => {}
            }
        }
    }

    fn line(&mut self, text: String) {
        if self.init.is_none() && text.contains(INIT_MARKER) {
            self.init = Some(Instant::now());
        }
        if self.panic.is_none()
            && let Some(at) = text.find(PANIC_MARKER)
        {
            self.panic = Some(text[at..].into());
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
        }
        self.last.push_back(text);
    }
}

/// A console's output on its way to the terminal.
pub(crate) struct Tap<W> {
    output: W,
    watch: Watch,
    console: usize,
}

impl<W: Write> Tap<W> {
    /// Passes everything on to `output` and shows it to `watch`.
    pub(crate) fn new(output: W, watch: Watch) -> Self {
        let console = {
            let mut seen = watch.seen();
            seen.unfinished.push(Vec::new());
            seen.unfinished.len() - 1
        };
        Self {
            output,
            watch,
            console,
        }
    }
}

impl<W: Write> Write for Tap<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch.seen().look(self.console, bytes);
        self.output.write_all(bytes)?;
        // Guest output has no line discipline of its own: a prompt must appear without a newline.
        self.output.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_marker_is_found_across_writes() {
        let watch = Watch::default();
        watch.start();
        let mut tap = Tap::new(Vec::new(), watch.clone());
        tap.write_all(b"[    1.0] RunRun /in").unwrap();
        assert_eq!(watch.time_to_init(), None);
        tap.write_all(b"it as init process\r\n").unwrap();
        assert!(watch.time_to_init().is_some());
        assert!(tap.output.ends_with(b"process\r\n"));
    }

    #[test]
    fn a_panic_is_told_in_the_kernels_words() {
        let watch = Watch::default();
        let mut tap = Tap::new(Vec::new(), watch.clone());
        let lines =
            "[ 1.5] Kernel panic - not syncing: no root\r\n[ 1.6] Kernel panic - not syncing\n";
        tap.write_all(lines.as_bytes()).unwrap();
        let words = watch.panic().unwrap();
        assert_eq!(words, "Kernel panic - not syncing: no root");
    }

    #[test]
    fn the_last_lines_are_whole_and_the_prompt_is_among_them() {
        let watch = Watch::default();
        let mut tap = Tap::new(Vec::new(), watch.clone());
        let mut other = Tap::new(Vec::new(), watch.clone());
        for line in 0..20 {
            write!(tap, "li").unwrap();
            write!(other, "\r\n").unwrap();
            write!(tap, "ne {line}\r\n").unwrap();
        }
        write!(tap, "login: ").unwrap();
        let lines = watch.last_lines();
        assert_eq!(lines.len(), LAST_LINES + 1);
        assert_eq!((&*lines[0], &*lines[LAST_LINES]), ("line 10", "login:"));
        tap.write_all(&[b'x'; 4 * LINE_MAX]).unwrap();
        assert_eq!(watch.last_lines()[LAST_LINES].len(), LINE_MAX);
    }
}
