//! VMMs that were not written for Eptide: QEMU with `-accel kvm` boots a stock kernel by its own
//! firmware and devices.

mod common;

use std::process::Command;

use common::{Ept, Transcript, demo, eptide, long_tests, run};

/// Boots the demonstration's kernel in QEMU with more arguments; its shell script prints the number
/// of processors.
fn qemu(ept: Ept, test: &str, arguments: &[&str]) -> Transcript {
    let script = "echo processors: $(grep -c ^processor /proc/cpuinfo); cat /proc/interrupts";
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
    run(command.args(arguments))
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
                let transcript = qemu(Ept::$ept, stringify!($name), &$arguments);
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
    an_old_processor_boots(On, 1) ["-M", "pc", "-cpu", "kvm64"];
}

#[test]
fn a_program_that_cannot_be_reached_is_refused() {
    let refusal = |program: &std::path::Path| {
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
    let privileged = common::folder("privileged").join("program");
    std::fs::copy("/bin/true", &privileged).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    std::fs::set_permissions(&privileged, mode).unwrap();
    assert!(refusal(&privileged).contains("nothing is preloaded"));
}
