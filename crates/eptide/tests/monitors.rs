//! VMMs that were not written for Eptide: QEMU with `-accel kvm` boots a stock kernel by its own
//! firmware and devices.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Ept, demo, eptide, folder, long_tests, run};

/// QEMU with the demonstration's kernel, which runs a shell script, on a serial port at standard
/// output.
fn qemu(ept: Ept, test: &str, script: &str) -> Command {
    let prepared = demo(ept, test, script).arg("--prepare").output().unwrap();
    assert!(prepared.status.success(), "{prepared:?}");
    let paths = String::from_utf8(prepared.stdout).unwrap();
    let [kernel, initramfs] = paths.lines().collect::<Vec<_>>()[..] else {
        panic!("{paths}");
    };
    // In builds for tests the library is beside the tests, not beside the command.
    let library = std::env::current_exe().unwrap();
    let library = library.with_file_name("libeptide_preload.so");
    assert!(library.is_file(), "it takes `-p eptide-preload` too");
    let mut command = eptide();
    command.env("EPTIDE_PRELOAD", library);
    command.arg("exec").arg(match ept {
        Ept::On => "--ept=on",
        Ept::Off => "--ept=off",
    });
    command.args(["qemu-system-x86_64", "-accel", "kvm", "-m", "512"]);
    command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
    command.args(["-serial", "stdio", "-append", "console=ttyS0 eptide.batch"]);
    command.args(["-kernel", kernel, "-initrd", initramfs]);
    command
}

/// Tests that boot in QEMU: name, number of processors, arguments.
macro_rules! boots {
    ($($name:ident($ept:ident, $processors:literal) $arguments:expr;)*) => {
        $(
            #[test]
            fn $name() {
                if !long_tests() {
                    return;
                }
                let script = "echo processors: $(grep -c ^processor /proc/cpuinfo)";
                let mut qemu = qemu(Ept::$ept, stringify!($name), script);
                let transcript = run(qemu.args($arguments));
                transcript
                    .expect_status(0)
                    .expect_health()
                    .expect("Hypervisor detected: KVM")
                    .expect("reboot: Power down");
                assert_eq!(transcript.after("processors: "), stringify!($processors));
            }
        )*
    };
}

/// For several processors. On those of AMD that QEMU offers by default Linux complains about the
/// time-stamp counter, on hardware KVM too.
const INTEL: &str = "Haswell,vendor=GenuineIntel";

boots! {
    the_pc_boots(On, 1) ["-M", "pc", "-cpu", "host"];
    the_pc_boots_on_shadow_tables(Off, 2) ["-M", "pc", "-cpu", INTEL, "-smp", "2"];
    four_processors_boot(On, 4) ["-M", "q35", "-cpu", INTEL, "-smp", "4"];
    the_microvm_boots(On, 1) ["-M", "microvm", "-cpu", "host"];
    a_split_irqchip_boots(On, 2) ["-M", "q35,kernel-irqchip=split", "-cpu", INTEL, "-smp", "2"];
    controllers_in_user_space_boot(On, 1) ["-M", "pc,kernel-irqchip=off", "-cpu", "host"];
    an_old_processor_boots(On, 1) ["-M", "pc", "-cpu", "qemu64"];
}

/// QEMU's monitor, on a socket.
struct Monitor(UnixStream);

impl Monitor {
    /// Connects as soon as QEMU listens.
    fn connect(path: &Path) -> Monitor {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let mut monitor = Monitor(stream);
                    monitor.answer();
                    return monitor;
                }
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Reads to the next prompt.
    fn answer(&mut self) -> String {
        let mut text = Vec::new();
        while !text.ends_with(b"(qemu) ") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.0, "{command}").unwrap();
        self.answer()
    }
}

/// How long something that takes seconds may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Every state that KVM keeps goes through QEMU's hands, while the guest's memory changes.
#[test]
fn a_running_guest_migrates() {
    if !long_tests() {
        return;
    }
    const SCRIPT: &str = "i=0; while [ $i -lt 40 ]; do \
        echo tick $i $(md5sum /bin/busybox | cut -c1-8); i=$((i+1)); usleep 50000; done; echo ticks are over";
    let folder = folder("a_running_guest_migrates");
    let path = |name: &str| folder.join(name);
    let file = |name: &str| path(name).display().to_string();
    let start = |name: &str, more: &[&str]| {
        let mut command = qemu(Ept::On, "migrates", SCRIPT);
        command.args(["-M", "q35", "-cpu", INTEL, "-smp", "2", "-monitor"]);
        command.arg(format!("unix:{}.monitor,server,nowait", file(name)));
        command.args(more).stdin(Stdio::null());
        command.stdout(File::create(path(name)).unwrap());
        command.stderr(Stdio::null()).spawn().unwrap()
    };
    let console = |name: &str| String::from_utf8_lossy(&fs::read(path(name)).unwrap()).into_owned();

    let mut source = start("source", &[]);
    let mut monitor = Monitor::connect(&path("source.monitor"));
    let began = Instant::now();
    while !console("source").contains("tick 5 ") {
        assert!(began.elapsed() < PATIENCE, "{}", console("source"));
        std::thread::sleep(Duration::from_millis(20));
    }
    monitor.ask("migrate_set_parameter max-bandwidth 10G");
    monitor.ask(&format!("migrate \"exec:cat > {}\"", file("state")));
    let status = monitor.ask("info migrate");
    assert!(status.contains("Migration status: completed"), "{status}");
    writeln!(monitor.0, "quit").unwrap();
    assert_eq!(common::wait(&mut source), Some(0));
    assert!(
        !console("source").contains("ticks are over"),
        "it was over before"
    );

    let incoming = format!("exec:cat {}", file("state"));
    let mut target = start("target", &["-incoming", &incoming]);
    assert_eq!(common::wait(&mut target), Some(0));
    let all = console("source") + &console("target");
    assert!(console("target").contains("reboot: Power down"), "{all}");
    let sums: Vec<_> = all
        .lines()
        .filter_map(|line| line.strip_prefix("tick ")?.trim().split_once(' '))
        .collect();
    assert!(
        sums.len() >= 39 && sums.iter().all(|(_, sum)| *sum == sums[0].1),
        "{all}"
    );
    assert!(!all.contains("WARNING") && !all.contains("BUG"), "{all}");
}

#[test]
fn a_program_that_cannot_be_reached_is_refused() {
    let refusal = |program: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_eptide"))
            .arg("exec")
            .arg(program)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let guest = common::own_guest("hello.elf");
    assert!(refusal(&guest).contains("statically linked"));
    assert!(refusal("no-such-program".as_ref()).contains("not found in PATH"));
    assert!(refusal("/no/such/program".as_ref()).contains("No such file"));
    let privileged = folder("privileged").join("program");
    fs::copy("/bin/true", &privileged).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    fs::set_permissions(&privileged, mode).unwrap();
    assert!(refusal(&privileged).contains("nothing is preloaded"));
}
