#!/bin/busybox sh
# Times programs of Debian packages, as init; says what it found as guests/compare does.
#
# Programs that do a given amount of work are timed by the kernel's uptime, in hundredths of a
# second; `openssl speed` works for a given time and says how far it came, which becomes the time
# of a given amount.
/bin/busybox mkdir -p /proc /dev /tmp
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
# The kernel's messages would end up in the middle of lines.
dmesg -n 1
cd /tmp

finish() {
  sync
  poweroff -f
}

fail() {
  tail -n 5 err
  echo "compare: failed: $1"
  finish
}

# Microseconds since boot.
now() {
  read -r seconds rest </proc/uptime
  echo "${seconds%.*}${seconds#*.}0000"
}

is_wanted() {
  case ",${compare_parts:-$1}," in
    *",$1,"*) ;;
    *) return 1 ;;
  esac
}

# Times a command; what it prints must be the same on every machine.
part() {
  name=$1
  shift
  is_wanted "$name" || return
  before=$(now)
  "$@" >out 2>err || fail "$name"
  after=$(now)
  sum=$(md5sum <out)
  echo "compare: part user $name ${sum%% *} $((after - before))"
}

# The time for 64 MiB.
throughput() {
  is_wanted "$1" || return
  openssl speed -elapsed -seconds 1 -bytes 8192 -mr "$1" >out 2>err || fail "$1"
  awk -F: -v name="$1" '$1 == "+F" {
    printf "compare: part user %s - %d\n", name, (64 * 1048576 / $NF) * 1000000
  }' out
}

# The time for 100 signatures.
signatures() {
  is_wanted "$1" || return
  openssl speed -elapsed -seconds 1 -mr "$1" >out 2>err || fail "$1"
  awk -F: -v name="$1" '$1 == "+F2" {
    printf "compare: part user %s - %d\n", name, 100 / $4 * 1000000
  }' out
}

database() {
  sqlite3 :memory: <script.sql
}

compile() {
  gcc-12 -O2 -I . -c many.c -o many.o && cat many.o
}

echo "compare: start"
start=$(now)
divide=${compare_divide:-1}
awk -v rows=$((12000 / divide)) -f /given/script.awk >script.sql
for copy in $(seq $(((6 + divide - 1) / divide))); do
  sed "s/COPY/$copy/g" /given/template.c
done >many.c
head -c $((600000 / divide)) /usr/lib/x86_64-linux-gnu/libcrypto.so.3 >data

throughput aes-128-cbc
throughput sha256
signatures rsa2048
# By its path: the shell takes its own xz otherwise.
part xz /usr/bin/xz -c data
part sqlite3 database
part python3 python3.11 -I -S /given/benchmark.py $((20 / divide))
part gcc compile
end=$(now)
echo "compare: end $((end - start))"
finish
