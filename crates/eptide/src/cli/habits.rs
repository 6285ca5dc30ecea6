//! Options of other virtual machines that people type by habit, with one dash in front.

use std::ffi::OsString;

/// What is typed and what is meant.
const HABITS: [(&str, &str); 15] = [
    ("-kernel", "write --kernel FILE"),
    ("-initrd", "write --initrd FILE"),
    ("-append", "write --append LINE"),
    ("-smp", "write --cpus N"),
    ("-drive", "write --disk FILE or --disk FILE,readonly"),
    ("-hda", "write --disk FILE"),
    ("-cdrom", "write --disk FILE,readonly"),
    (
        "-nographic",
        "leave it out: the terminal is the guest's console",
    ),
    (
        "-serial",
        "leave it out: the terminal is the guest's console",
    ),
    (
        "-display",
        "leave it out: the terminal is the guest's console",
    ),
    ("-accel", "leave it out: eptide is the accelerator"),
    ("-enable-kvm", "leave it out: eptide is the accelerator"),
    ("-cpu", "leave it out: the guest sees the host's processor"),
    ("-no-reboot", "leave it out: a reset ends the guest"),
    ("-machine", "leave it out: there is one machine"),
];

/// What to write instead of the first word that is another program's. Only what boots a guest has
/// such options; `exec`'s words are the program's.
pub(super) fn hint(words: &[OsString]) -> Option<String> {
    let boots = |word: &OsString| word == "run" || word == "demo";
    words.get(1).filter(|word| boots(word))?;
    words[2..].iter().find_map(|word| {
        let (name, meant) = HABITS.iter().find(|(name, _)| word == name)?;
        Some(format!("{name}: {meant}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint_of(line: &str) -> Option<String> {
        let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
        hint(&words)
    }

    #[test]
    fn options_of_other_programs_get_a_hint() {
        let hint = hint_of("eptide run -m 512 -smp 2 -kernel k");
        assert_eq!(hint.as_deref(), Some("-smp: write --cpus N"));
        assert!(hint_of("eptide demo -nographic").is_some());
    }

    #[test]
    fn a_programs_own_options_are_not_looked_at() {
        assert_eq!(hint_of("eptide exec qemu-system-x86_64 -kernel k"), None);
        assert_eq!(hint_of("eptide run --kernel k -m 512"), None);
        assert_eq!(hint_of("eptide"), None);
    }
}
