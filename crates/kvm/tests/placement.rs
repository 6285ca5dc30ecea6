//! The crate's own threads leave the processors to vCPUs.

mod common;

use common::*;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The processors that the threads of a name may run on, by thread.
fn processors_of(name: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    tasks
        .map(|task| task.unwrap().path())
        .filter(|task| read(task.join("comm")).trim() == name)
        .filter_map(|task| {
            let status = read(task.join("status"));
            let allowed = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            allowed.map(|list| list.trim().to_owned())
        })
        .collect()
}

/// Confines the calling thread to one processor.
fn pin(processor: usize) {
    // SAFETY: the set is plain data, and lives for the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        let failed = libc::sched_setaffinity(0, size_of_val(&set), &set);
        assert_eq!(failed, 0);
    }
}

fn allowed() -> Vec<usize> {
    // SAFETY: as above.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        assert_eq!(libc::sched_getaffinity(0, size_of_val(&set), &mut set), 0);
        (0..libc::CPU_SETSIZE as usize)
            .filter(|&n| libc::CPU_ISSET(n, &set))
            .collect()
    }
}

#[test]
fn interrupts_are_delivered_from_another_processor() {
    let allowed = allowed();
    let [first, second, ..] = allowed[..] else {
        eprintln!("skipped: there is one processor");
        return;
    };
    let code = assemble(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.inc(qword_ptr(0x5008))?;
        a.jmp(spin)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.vm.register_irqfd(&line, 20).unwrap();
    let interrupter = machine.vcpu().interrupter();
    let vcpu = machine.vcpu();
    for processor in [first, second] {
        let mut seen = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(processor);
                vcpu.run().unwrap_err()
            });
            let others: Vec<_> = allowed.iter().filter(|&&n| n != processor).collect();
            let keep_off = |name| {
                let lists = processors_of(name);
                let keeps_off = |list: &String| members(list).iter().eq(others.iter().copied());
                !lists.is_empty() && lists.iter().all(keeps_off)
            };
            let start = Instant::now();
            for name in ["kvm-irqfd", "kvm-timers", "kvm-watch"] {
                while !keep_off(name) && start.elapsed() < Duration::from_secs(10) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let last = processors_of(name);
                seen.push((keep_off(name), name, last));
            }
            interrupter.interrupt();
        });
        assert!(seen.iter().all(|&(keeps_off, ..)| keeps_off), "{seen:?}");
    }
}

/// The members of a list such as `0,2-4`.
fn members(list: &str) -> Vec<usize> {
    list.split(',')
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse::<usize>().unwrap()..=last.parse().unwrap()
        })
        .collect()
}
