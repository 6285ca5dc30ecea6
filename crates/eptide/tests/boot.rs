//! Stock Debian kernels boot, work and stop as they should, with EPT and on shadow page tables.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Ept, Transcript, demo, eptide, folder, run};

/// Makes two tests that boot kernels of each `fn(Ept)`: `ept::name` and `shadow::name`.
macro_rules! with_and_without_ept {
    ($($test:ident,)*) => {
        with_and_without_ept!(ept, On, $($test),*);
        with_and_without_ept!(shadow, Off, $($test),*);
    };
    ($mode:ident, $ept:ident, $($test:ident),*) => {
        mod $mode {
            $(
                #[test]
                fn $test() {
                    if super::common::long_tests() {
                        super::$test(super::common::Ept::$ept);
                    }
                }
            )*
        }
    };
}

with_and_without_ept! {
    one_processor_boots_to_power_off_without_a_complaint,
    the_kernel_boots_as_an_elf_file_by_both_protocols,
    two_processors_write_an_ext4_disk_that_the_host_finds_clean,
    four_processors_under_load_corrupt_nothing,
    a_crashed_kernel_is_told_apart_from_a_reset,
    every_way_to_reset_has_its_status,
    a_dozen_modules_load,
    the_kernel_can_change_its_own_code,
    the_virtio_console_can_be_the_terminal,
    the_distribution_kernel_boots_too,
    a_32_bit_kernel_boots,
    a_32_bit_kernel_with_pae_boots,
}

fn one_processor_boots_to_power_off_without_a_complaint(ept: Ept) {
    let transcript = run(&mut demo(
        ept,
        "one",
        "uname -r; cat /proc/cpuinfo; dmesg | grep -i x2apic",
    ));
    transcript.expect_status(0).expect_health();
    transcript
        .expect("Run /init as init process")
        .expect("reboot: Power down");
    transcript
        .expect("Hypervisor detected: KVM")
        .expect("hypervisor: KVM");
    transcript
        .expect("kvm-clock: Using msrs")
        .expect("x2apic enabled");
    expect_the_host_s_processor(&transcript);
    for line in ["time to init", "time in all"] {
        assert!(transcript.messages.contains(line), "{}", transcript.text());
    }
}

/// `/proc/cpuinfo` shows the host's processor with the features that are offered, and what the
/// kernel measured itself.
fn expect_the_host_s_processor(transcript: &Transcript) {
    let host = fs::read_to_string("/proc/cpuinfo").unwrap();
    let host = |field: &str| {
        let line = host.lines().find_map(|line| line.strip_prefix(field));
        line.unwrap_or_default().trim().to_owned()
    };
    for field in [
        "vendor_id\t: ",
        "cpu family\t: ",
        "model\t\t: ",
        "stepping\t: ",
        "clflush size\t: ",
    ] {
        assert_eq!(transcript.after(field), host(field), "{field}");
    }
    for (field, value) in [
        ("cpu cores\t: ", "1"),
        ("siblings\t: ", "1"),
        ("fpu_exception\t: ", "yes"),
        ("wp\t\t: ", "yes"),
    ] {
        assert_eq!(transcript.after(field), value, "{field}");
    }
    let flags: Vec<&str> = transcript.after("flags\t\t: ").split(' ').collect();
    for flag in [
        "fpu",
        "de",
        "pse",
        "tsc",
        "msr",
        "pae",
        "mce",
        "cx8",
        "apic",
        "sep",
        "mtrr",
        "pge",
        "cmov",
        "pat",
        "mmx",
        "fxsr",
        "sse2",
        "syscall",
        "nx",
        "rdtscp",
        "lm",
        "constant_tsc",
        "nonstop_tsc",
        "cpuid",
        "tsc_known_freq",
        "cx16",
        "x2apic",
        "tsc_deadline_timer",
        "hypervisor",
        "lahf_lm",
        "tsc_adjust",
        "arat",
        "smap",
        "umip",
        "pku",
        "ospke",
        "la57",
    ] {
        assert!(flags.contains(&flag), "no {flag} in {flags:?}");
    }
    // What the processor does not implement is not offered, whatever the host has.
    for flag in ["vmx", "svm", "monitor", "avx512f", "amx_tile", "mpx", "rtm"] {
        assert!(!flags.contains(&flag), "{flag} in {flags:?}");
    }
    let megahertz = |text: &str| -> f64 { text.split(' ').next().unwrap().parse().unwrap() };
    let measured = megahertz(transcript.after("tsc: Detected "));
    assert!((megahertz(transcript.after("cpu MHz\t\t: ")) - measured).abs() < 1.0);
    assert!((megahertz(transcript.after("bogomips\t: ")) / 2.0 - measured).abs() < 1.0);
    // The guest has the host's bugs; one more follows from a feature that is not offered.
    let known: Vec<String> = host("bugs\t\t: ").split(' ').map(str::to_owned).collect();
    for bug in transcript.after("bugs\t\t: ").split(' ') {
        let explained = known.iter().any(|known| known == bug) || bug == "fxsave_leak";
        assert!(explained, "{bug}, which the host does not have: {known:?}");
    }
}

/// The same kernel without its own unpacking code, by the Linux and the PVH protocol.
fn the_kernel_boots_as_an_elf_file_by_both_protocols(ept: Ept) {
    let prepared = run(demo(ept, "elf", "echo \"arrived: $(uname -m)\"").arg("--prepare"));
    prepared.expect_status(0);
    let mut paths = prepared.console.lines();
    let (kernel, initramfs) = (paths.next().unwrap(), paths.next().unwrap());
    let vmlinux = common::vmlinux_of(Path::new(kernel), &ept.name("vmlinux"));
    for protocol in ["linux", "pvh"] {
        let mut command = eptide();
        command.args(["run", "--memory", "512M", "--protocol", protocol]);
        command.args([
            "--append",
            "console=ttyS0",
            "--initrd",
            initramfs,
            "--kernel",
        ]);
        let transcript = run(command.arg(&vmlinux).arg(match ept {
            Ept::On => "--ept=on",
            Ept::Off => "--ept=off",
        }));
        transcript
            .expect_status(0)
            .expect_health()
            .expect("Run /init as init process")
            .expect("kvm-clock: Using msrs")
            .expect("arrived: x86_64")
            .expect("reboot: Power down");
    }
}

fn two_processors_write_an_ext4_disk_that_the_host_finds_clean(ept: Ept) {
    let disk = folder(&ept.name("two-disk")).join("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    tool("mke2fs", &["-q", "-t", "ext4"], &disk);
    let script = "
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null
        echo \"sum: $(sha256sum < /mnt/file)\"
        mkdir /mnt/folder && seq 1 200 | while read n; do echo $n > /mnt/folder/$n; done
        sync && umount /mnt && echo unmounted
    ";
    let transcript = run(demo(ept, "two", script)
        .args(["--cpus", "2", "--disk"])
        .arg(&disk));
    transcript.expect_status(0).expect_health();
    transcript
        .expect("Brought up 1 node, 2 CPUs")
        .expect("unmounted");

    tool("e2fsck", &["-f", "-n"], &disk);
    let copy = disk.with_file_name("copy");
    tool(
        "debugfs",
        &["-R", &format!("dump file {}", copy.display())],
        &disk,
    );
    let sum = Command::new("sha256sum")
        .arg(&copy)
        .output()
        .unwrap()
        .stdout;
    let sum = String::from_utf8(sum).unwrap();
    assert_eq!(transcript.after("sum: ")[..64], sum[..64]);
}

/// Runs one of e2fsprogs on an image; it must succeed.
fn tool(name: &str, arguments: &[&str], image: &Path) {
    // Debian keeps these where ordinary users' PATH does not look.
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new("env")
        .env("PATH", path)
        .arg(name)
        .args(arguments)
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
}

fn four_processors_under_load_corrupt_nothing(ept: Ept) {
    let script = load(60);
    let transcript = run(demo(ept, "load", &script).args(["--cpus", "4"]));
    transcript.expect_status(0).expect_health();
    transcript.expect("Brought up 1 node, 4 CPUs");
    expect_sound_load(&transcript);
}

/// A script that keeps six workers busy for some seconds with programs whose results are known.
fn load(seconds: u32) -> String {
    let workers = r#"
        seq 1 20000 > /tmp/reference
        expected=$(sha256sum < /tmp/reference)
        end=$(($(date +%s) + seconds))
        worker() {
            rounds=0
            while [ "$(date +%s)" -lt "$end" ]; do
                [ "$(seq 1 20000 | sha256sum)" = "$expected" ] || echo "corrupt: seq"
                gzip < /tmp/reference | gunzip | cmp - /tmp/reference || echo "corrupt: gzip"
                dd if=/tmp/reference of=/tmp/copy.$1 bs=777 2>/dev/null
                [ "$(sha256sum < /tmp/copy.$1)" = "$expected" ] || echo "corrupt: copy"
                rounds=$((rounds + 1))
            done
            echo "worker $1 made $rounds rounds"
        }
        for n in 1 2 3 4 5 6; do worker $n & done
        wait
        echo "all workers done"
    "#;
    format!("seconds={seconds}\n{workers}")
}

/// Asserts that every worker of [`load`] worked, and rightly.
fn expect_sound_load(transcript: &Transcript) {
    transcript.expect("all workers done");
    assert!(
        !transcript.console.contains("corrupt:"),
        "{}",
        transcript.text()
    );
    for worker in 1..=6 {
        assert_ne!(
            transcript.after(&format!("worker {worker} made ")),
            "0 rounds"
        );
    }
}

fn a_crashed_kernel_is_told_apart_from_a_reset(ept: Ept) {
    let script = "echo c > /proc/sysrq-trigger";
    let transcript = run(demo(ept, "crash", script).args(["--append", "panic=1"]));
    transcript
        .expect_status(121)
        .expect("Kernel panic - not syncing: sysrq triggered crash");
    for words in ["eptide: Kernel panic - not syncing: sysrq", "last lines"] {
        assert!(transcript.messages.contains(words), "{}", transcript.text());
    }
}

fn every_way_to_reset_has_its_status(ept: Ept) {
    for (way, status) in [("acpi", 122), ("kbd", 122), ("triple", 123)] {
        let reboot = format!("reboot={way}");
        let mut command = demo(ept, "reset", "reboot -f");
        run(command.args(["--append", &reboot]))
            .expect_status(status)
            .expect_health();
    }
}

fn a_dozen_modules_load(ept: Ept) {
    const MODULES: [&str; 12] = [
        "loop",
        "dummy",
        "veth",
        "bridge",
        "tun",
        "xfs",
        "btrfs",
        "fuse",
        "isofs",
        "udf",
        "nbd",
        "virtio_net",
    ];
    let mut command = demo(ept, "modules", "lsmod; echo \"loaded: $(lsmod | wc -l)\"");
    for module in MODULES {
        command.args(["--module", module]);
    }
    let transcript = run(&mut command);
    transcript.expect_status(0).expect_health();
    assert!(
        !transcript.console.contains("could not load"),
        "{}",
        transcript.text()
    );
    for module in MODULES {
        transcript.expect(&format!("\n{module} "));
    }
}

fn the_kernel_can_change_its_own_code(ept: Ept) {
    // The function tracer patches the entry of every kernel function and back; static keys patch
    // jumps; both with other processors running.
    let script = r#"
        mount -t tracefs tracefs /sys/kernel/tracing
        cd /sys/kernel/tracing
        grep -q function available_tracers || echo "no function tracer"
        for round in 1 2 3; do
            echo function > current_tracer
            ls -l / > /dev/null
            [ "$(head -n 50 trace | grep -c '<-')" -gt 10 ] && echo "round $round traced"
            echo nop > current_tracer
        done
        cat /proc/sys/kernel/ftrace_enabled
    "#;
    let transcript = run(demo(ept, "ftrace", script).args(["--cpus", "2"]));
    transcript.expect_status(0).expect_health();
    for round in 1..=3 {
        transcript.expect(&format!("round {round} traced"));
    }
}

fn the_virtio_console_can_be_the_terminal(ept: Ept) {
    let transcript =
        run(demo(ept, "hvc0", "echo on $(readlink /proc/$$/fd/1)").args(["--console", "hvc0"]));
    transcript.expect_status(0).expect("on /dev/hvc0");
}

fn the_distribution_kernel_boots_too(ept: Ept) {
    let mut command = demo(ept, "distribution", "uname -v");
    let transcript = run(command.args(["--kernel-package", "linux-image-amd64"]));
    transcript
        .expect_status(0)
        .expect_health()
        .expect("kvm-clock: Using msrs");
}

fn a_32_bit_kernel_boots(ept: Ept) {
    boot_32_bit(ept, "linux-image-686", 1);
    if let Ept::Off = ept {
        boot_32_bit(ept, "linux-image-686", 4);
    }
}

fn a_32_bit_kernel_with_pae_boots(ept: Ept) {
    if let Ept::Off = ept {
        boot_32_bit(ept, "linux-image-686-pae", 1);
    }
    boot_32_bit(ept, "linux-image-686-pae", 4);
}

/// Boots an i386 kernel to an i386 busybox and has both work.
fn boot_32_bit(ept: Ept, package: &str, cpus: u32) {
    let script = format!("uname -m\n{}", load(5));
    let transcript = run(demo(ept, package, &script)
        .args(["--kernel-package", &format!("{package}:i386")])
        .args(["--cpus", &cpus.to_string()])
        // The kernel's tests of its own ciphers are half of the boot.
        .args(["--append", "cryptomgr.notests"]));
    transcript
        .expect_status(0)
        .expect_health()
        .expect("\ni686\n")
        .expect("hypervisor: KVM");
    if cpus > 1 {
        transcript.expect(&format!("Brought up 1 node, {cpus} CPUs"));
    }
    expect_sound_load(&transcript);
}
