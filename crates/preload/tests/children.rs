//! Programs that the library would not be loaded into do not reach the machine's own device. None
//! of those here would open it: they only look as if.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A statically linked program that ends at once with status 9, and holds `content`.
fn program(name: &str, content: &[u8]) -> PathBuf {
    const BASE: u64 = 0x40_0000;
    // mov $60, %eax; mov $9, %edi; syscall
    let code = [0xb8, 60, 0, 0, 0, 0xbf, 9, 0, 0, 0, 0x0f, 0x05];
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&(BASE + 120).to_le_bytes()); // entry
    put(&64_u64.to_le_bytes()); // program headers
    put(&[0; 12]);
    put(&[64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    put(&[1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    put(&0_u64.to_le_bytes());
    put(&BASE.to_le_bytes());
    put(&BASE.to_le_bytes());
    let size = (120 + code.len() + content.len()) as u64;
    put(&size.to_le_bytes());
    put(&size.to_le_bytes());
    put(&4096_u64.to_le_bytes());
    put(&code);
    put(content);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("children");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name);
    fs::write(&path, file).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A shell with the library, and a command for it.
fn shell(command: &str, program: &Path) -> Command {
    let library = std::env::current_exe().unwrap();
    let library = library.with_file_name("libeptide_preload.so");
    assert!(library.is_file(), "{} is missing", library.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).arg("sh").arg(program);
    shell.env("LD_PRELOAD", library);
    shell
}

fn messages(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_static_program_that_knows_the_device_is_not_started() {
    // The name lies across what is read at a time.
    let mut content = vec![0; 16384 - 120 - 12 - 4];
    content.extend(b"/dev/kvm\0");
    for (name, content) in [("near", &b"..../dev/kvm"[..]), ("far", &content)] {
        let program = program(name, content);
        for command in [
            "\"$1\"",
            "exec \"$1\"",
            "env \"$1\"",
            "exec env -u X \"$1\"",
        ] {
            let output = shell(command, &program).output().unwrap();
            assert_eq!(output.status.code(), Some(126), "{command}: {output:?}");
            let name = format!("eptide: {}: not started", program.display());
            assert!(messages(&output).contains(&name), "{output:?}");
        }
        let mut allowed = shell("\"$1\"", &program);
        let output = allowed.env("EPTIDE_BYPASS", "allow").output().unwrap();
        assert_eq!(output.status.code(), Some(9), "{output:?}");
    }
}

#[test]
fn another_static_program_is_unless_it_is_given_the_device() {
    let program = program("other", b"/dev/null /dev/kv");
    let output = shell("\"$1\" a b", &program).output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    assert_eq!(messages(&output), "");
    let output = shell("\"$1\" -device=/dev/kvm", &program).output().unwrap();
    assert_eq!(output.status.code(), Some(126), "{output:?}");
}

#[test]
fn a_program_found_by_path_is_looked_at_too() {
    let program = program("found", b"/dev/kvm");
    let folder = program.parent().unwrap();
    let path = format!("/nonexistent:{}:/usr/bin:/bin", folder.display());
    for command in ["found", "env found", "find /dev/null -exec found {} +"] {
        let output = shell(command, &program)
            .env("PATH", &path)
            .output()
            .unwrap();
        assert!(
            messages(&output).contains("found: not started"),
            "{command}: {output:?}"
        );
        assert_ne!(output.status.code(), Some(9), "{command}");
    }
}

#[test]
fn a_program_in_an_environment_without_the_library_is_looked_at_too() {
    let sh = Path::new("/bin/sh");
    let wanting = "env -i \"$1\" -c ': /dev/kvm'";
    let output = shell(wanting, sh).output().unwrap();
    assert_eq!(output.status.code(), Some(126), "{output:?}");
    assert!(
        messages(&output).contains("/bin/sh: not started"),
        "{output:?}"
    );
    let other = "env -i \"$1\" -c 'exit 9'";
    let output = shell(other, sh).output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    let kept = "env -i LD_PRELOAD=\"$LD_PRELOAD\" \"$1\" -c 'test -c /dev/kvm && exit 9'";
    let output = shell(kept, sh).output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{output:?}");
}

#[test]
fn programs_that_the_library_is_loaded_into_start() {
    let output = shell(
        "cat /dev/null && test -c /dev/kvm && echo \"$1\"",
        Path::new("/dev/kvm"),
    );
    let output = { output }.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(messages(&output), "");
}
