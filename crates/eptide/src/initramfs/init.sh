#!/bin/busybox sh
# First user program of guests that Eptide makes an initramfs for. Loads what the kernel keeps in
# modules, shows what the machine looks like from inside, and runs a command or hands over a shell.

/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root /bin /sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/root TERM=linux PS1='guest# '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
hostname eptide

option() { grep -qw "$1" /proc/cmdline; }

# The host listens on the second serial port where it waits for a result.
report() { [ -c /dev/ttyS1 ] && printf '\neptide %s\n' "$*" 2>/dev/null >/dev/ttyS1; }

switch_off() {
    sync
    # The kernel's farewell is of its most urgent kind; a panic is shown all the same.
    option quiet && echo 0 >/proc/sys/kernel/printk
    poweroff -f
}

for module in $(cat /modules/order 2>/dev/null); do
    insmod "/modules/$module" && continue
    echo "could not load $module"
    if grep -qx "$module" /modules/wanted; then
        report "failed the kernel does not load $module"
        switch_off
    fi
done

# The virtio console exists only now that its driver is loaded.
option console=hvc0 && [ -c /dev/hvc0 ] && exec </dev/hvc0 >/dev/hvc0 2>&1

show_machine() {
    echo
    echo "$(uname -sr) on $(grep -c ^processor /proc/cpuinfo) processor(s):" \
        "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
    echo "hypervisor: $(dmesg | sed -n 's/.*Hypervisor detected: //p' | head -n 1)"
    echo "clock source: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    echo "memory: $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
    for disk in /sys/block/vd*; do
        [ -e "$disk" ] && echo "disk: /dev/${disk##*/}, $(cat "$disk/size") sectors"
    done
    echo
}
[ -e /plain ] || show_machine

# From here on, what the host has to type is read.
report ready
if [ -x /command ]; then
    if option eptide.batch; then
        /command </dev/null
    else
        /command
    fi
    status=$?
    sync
    report "status $status"
elif option eptide.batch; then
    echo "no terminal on the host: nothing to type, powering off"
else
    echo "You are root in the guest. Type 'poweroff -f' or Ctrl-D to switch off, Ctrl-A X to leave."
    cd /root
    setsid cttyhack sh
fi
switch_off
