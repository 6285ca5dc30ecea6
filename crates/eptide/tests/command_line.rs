//! The command as a person meets it: what it says when something is wrong. Nothing here gets as
//! far as starting a guest.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A folder for one test's files.
fn folder(test: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn eptide(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_eptide"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Runs a command that must fail with status 1 and one message.
fn refusal(arguments: &[&str]) -> String {
    let output = eptide(arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn help_names_every_command() {
    let output = eptide(&["--help"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for command in ["demo", "doctor", "exec", "run"] {
        assert!(text.contains(command), "{text}");
    }
}

#[test]
fn a_programs_own_options_are_not_execs() {
    for option in ["--help", "--version", "--ept"] {
        let message = refusal(&["exec", "/no/such/program", option]);
        assert_eq!(
            message,
            "eptide: /no/such/program: No such file or directory (os error 2)\n"
        );
    }
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let message = refusal(&["run", "--kernel", "/no/such/vmlinuz"]);
    assert_eq!(
        message,
        "eptide: kernel /no/such/vmlinuz: No such file or directory (os error 2)\n"
    );
}

#[test]
fn a_file_that_is_no_kernel_is_named() {
    let message = refusal(&["run", "--kernel", "/etc/passwd"]);
    assert!(
        message.contains("neither a bzImage nor an ELF file"),
        "{message}"
    );
}

#[test]
fn this_program_is_no_kernel_and_the_message_says_why() {
    // A position-independent program is an ELF file for the right machine; it loads at zero and
    // is harmless to load, so only its truncation is refused here.
    let folder = folder("truncated");
    let program = fs::read(env!("CARGO_BIN_EXE_eptide")).unwrap();
    let path = folder.join("vmlinux");
    fs::write(&path, &program[..program.len().min(4096)]).unwrap();
    let message = refusal(&["run", "--kernel", path.to_str().unwrap()]);
    assert!(
        message.contains("truncated: the header promises"),
        "{message}"
    );
}

#[test]
fn memory_is_checked_before_anything_is_loaded() {
    let message = refusal(&["run", "--kernel", "/no/such", "--memory", "1M"]);
    assert!(message.contains("at least 2M"), "{message}");
}

#[test]
fn a_disk_that_is_not_there_is_named_with_a_way_out() {
    let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/../../guests/hello.elf");
    let message = refusal(&["run", "--kernel", hello, "--disk", "/no/such/disk.img"]);
    assert!(
        message.contains("/no/such/disk.img") && message.contains("mke2fs"),
        "{message}"
    );
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/../../guests/hello.elf");
    let initrd = folder("initrd").join("large");
    fs::File::create(&initrd).unwrap().set_len(8 << 20).unwrap();
    let initrd = initrd.to_str().unwrap();
    let arguments = [
        "run", "--kernel", hello, "--memory", "8M", "--initrd", initrd,
    ];
    let message = refusal(&arguments);
    assert!(
        message.contains("give the guest more --memory"),
        "{message}"
    );
}

#[test]
fn bad_arguments_are_usage_errors() {
    for arguments in [
        &["run"][..],
        &["run", "--kernel", "k", "--memory", "lots"],
        &["fly"],
    ] {
        assert_eq!(eptide(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn options_of_other_programs_get_a_hint() {
    for (words, hint) in [
        (&["run", "-kernel", "k"][..], "-kernel: write --kernel FILE"),
        (&["run", "--kernel", "k", "-smp", "2"], "write --cpus N"),
        (
            &["demo", "-nographic"],
            "the terminal is the guest's console",
        ),
        (
            &["run", "--kernel", "k", "--disk", "file=a,if=virtio"],
            "FILE,readonly",
        ),
        (
            &["run", "--kernel", "k", "-m", "536870912"],
            "a number alone is MiB",
        ),
    ] {
        let output = eptide(words);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(hint), "{words:?}: {text}");
    }
}

#[test]
fn an_image_that_is_not_raw_is_refused_with_the_way_to_make_it_raw() {
    let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/../../guests/hello.elf");
    let folder = folder("formats");
    for (magic, format) in [(&b"QFI\xfb\0\0\0\x03"[..], "qcow2"), (b"KDMV\x01", "VMDK")] {
        let image = folder.join(format);
        let mut content = magic.to_vec();
        content.resize(65536, 0);
        fs::write(&image, content).unwrap();
        let image = image.to_str().unwrap();
        let message = refusal(&["run", "--kernel", hello, "--disk", image]);
        assert_eq!(
            message,
            format!(
                "eptide: disk {image}: a {format} image, and disks are raw; convert it with \
                 `qemu-img convert -O raw {image} FILE`\n"
            )
        );
    }
}

#[test]
fn man_pages_and_completions_are_generated() {
    let folder = folder("generated");
    let output = eptide(&["generate", folder.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let page = fs::read_to_string(folder.join("man1/eptide-run.1")).unwrap();
    for text in ["\\-\\-timeout", "kernel panic", "122"] {
        assert!(page.contains(text), "no {text:?} in {page}");
    }
    let completions = fs::read_to_string(folder.join("completions/eptide.bash")).unwrap();
    assert!(completions.contains("--kernel"), "{completions}");
    assert!(folder.join("completions/_eptide").is_file());
}
