# Runs in a guest, after WHERE (pci or LNRO0005), PACKED (0 or 1) and QUEUES were set.

transport() {
    ls -l /sys/bus/virtio/devices
    for device in /sys/bus/virtio/devices/*; do
        readlink "$device" | grep -q "$WHERE" || return 1
    done
}

# Bit 34 of the accepted features.
ring_format() {
    for device in /sys/bus/virtio/devices/*; do
        echo "$device $(cat "$device/features")"
        test "$(cut -c 35 "$device/features")" = "$PACKED" || return 1
    done
}

queues() {
    ls /sys/block/vda/mq /sys/class/net/eth0/queues
    test "$(ls /sys/block/vda/mq | wc -l)" = "$QUEUES" &&
        test "$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)" = "$QUEUES"
}

disk() {
    mke2fs /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt || return 1
    seq 1 200000 | tee /mnt/kept | md5sum >/tmp/sum
    dd if=/dev/urandom of=/mnt/random bs=4k count=512 conv=fsync || return 1
    md5sum /mnt/random >/tmp/random.sum
    sync
    umount /mnt && mount /dev/vda /mnt || return 1
    echo 3 >/proc/sys/vm/drop_caches
    md5sum </mnt/kept | cmp - /tmp/sum && md5sum -c /tmp/random.sum || return 1
    umount /mnt
}

# On a new driver, which resets the device, the contents are what they were.
disk_after_reset() {
    rmmod virtio_blk && modprobe virtio_blk && mount -o ro /dev/vda /mnt || return 1
    md5sum </mnt/kept | cmp - /tmp/sum && umount /mnt
}

read_only_disk() {
    test "$(blockdev --getro /dev/vdb)" = 1 && ! dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync
}

discard() {
    blkdiscard -o 8388608 -l 1048576 /dev/vda
}

dhcp() {
    printf '#!/bin/sh\n[ "$1" != bound ] || ip addr add "$ip/24" dev "$interface"\n' >/tmp/bound
    chmod +x /tmp/bound
    ip link set eth0 up && udhcpc -i eth0 -n -q -t 10 -T 2 -s /tmp/bound &&
        ip addr show dev eth0 | grep -q 10.0.2.15/24
}

ping_host() {
    ping -c 3 -W 10 10.0.2.2 && ping -c 2 -s 1400 -W 10 10.0.2.2
}

http() {
    seq 1 40000 >/tmp/numbers
    wget -O /tmp/page http://10.0.2.2/numbers && cmp /tmp/page /tmp/numbers &&
        ! wget -O /dev/null http://10.0.2.2/nothing
}

tcp_echo() {
    nc 10.0.2.2 7 </tmp/numbers >/tmp/echoed
    cmp /tmp/echoed /tmp/numbers
}

random() {
    grep virtio /sys/class/misc/hw_random/rng_current || return 1
    dd if=/dev/hwrng of=/tmp/one bs=1k count=16 && dd if=/dev/hwrng of=/tmp/two bs=1k count=16 || return 1
    test "$(wc -c </tmp/one)" = 16384 && ! cmp -s /tmp/one /tmp/two &&
        test "$(gzip -c /tmp/one | wc -c)" -gt 16000
}

console() {
    echo "spoken on $(cat /sys/class/tty/hvc0/dev)" >/dev/hvc0
}

sockets() {
    vsock-pipe 2 7 </tmp/numbers | cmp - /tmp/numbers && ! vsock-pipe 2 8 </dev/null
}

shared_folder() {
    mkdir /share && mount -t virtiofs host /share || return 1
    seq 1 40000 | cmp - /share/folder/numbers && test "$(/share/folder/program)" = "runs from there" &&
        test "$(readlink /share/link)" = folder/numbers && test "$(ls /share/many | wc -l)" = 300 &&
        ! touch /share/folder/new
}

# 64 MiB are asked for, in pages of 4 KiB.
balloon() {
    for try in $(seq 1 100); do
        held=$(awk '/^balloon_inflate/ { n += $2 } /^balloon_deflate/ { n -= $2 } END { print n }' /proc/vmstat)
        [ "$held" = 16384 ] && return 0
        usleep 100000
    done
    echo "$held pages"
    return 1
}

for name in transport ring_format queues disk disk_after_reset read_only_disk discard dhcp ping_host http \
    tcp_echo random console sockets shared_folder balloon; do
    check $name
done
