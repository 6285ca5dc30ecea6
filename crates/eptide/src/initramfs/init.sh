#!/bin/busybox sh
# First user program of the demonstration. Loads what the stock kernel keeps in modules, shows
# what the machine looks like from inside, and hands over a shell.

/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root /bin /sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/root TERM=linux PS1='guest# '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
hostname eptide

for module in $(cat /modules/order 2>/dev/null); do
    insmod "/modules/$module" || echo "could not load $module"
done

# The virtio console exists only now that its driver is loaded.
grep -qw console=hvc0 /proc/cmdline && exec </dev/hvc0 >/dev/hvc0 2>&1

option() { grep -qw "$1" /proc/cmdline; }

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

if [ -x /script ]; then
    /script
elif option eptide.batch; then
    echo "no terminal on the host: nothing to type, powering off"
else
    echo "You are root in the guest. Type 'poweroff -f' or Ctrl-D to switch off, Ctrl-A X to leave."
    cd /root
    setsid cttyhack sh
fi
sync
poweroff -f
