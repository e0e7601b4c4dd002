# Runs in a guest whose devices are behind an IOMMU, after RNG was set to its PCI function or nothing.

# Disk, network, random numbers and console, each alone in its group, whose domain translates.
groups() {
    ls -l /sys/kernel/iommu_groups/*/devices
    test "$(ls /sys/kernel/iommu_groups | wc -l)" = 4 &&
        test "$(cat /sys/kernel/iommu_groups/*/type | sort -u)" = DMA-FQ
}

disk() {
    mke2fs /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt || return 1
    dd if=/dev/urandom of=/tmp/random bs=64k count=64 && dd if=/tmp/random of=/mnt/random bs=64k conv=fsync || return 1
    umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/vda /mnt && cmp /tmp/random /mnt/random
}

network() {
    ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ping -c 3 -W 10 10.0.2.2 || return 1
    seq 1 40000 >/tmp/numbers
    wget -O /tmp/page http://10.0.2.2/numbers && cmp /tmp/page /tmp/numbers
}

# Plays the driver of a device, and gives it a queue that the device was never allowed to reach.
outside() {
    config=/sys/bus/pci/devices/$RNG/config
    echo "$RNG" >/sys/bus/pci/drivers/virtio-pci/unbind
    printf '\006\000' | dd of="$config" bs=1 seek=4 conv=notrunc || return 1
    base=$(($(head -n 1 "/sys/bus/pci/devices/$RNG/resource" | cut -d ' ' -f 1)))
    put() {
        devmem $((base + $1)) "$2" "$3"
    }
    for status in 0 1 3; do put 20 8 $status; done
    put 8 32 0 && put 12 32 0 && put 8 32 1 && put 12 32 3 && put 20 8 11 && put 22 16 0 || return 1
    put 32 32 0x10000000 && put 40 32 0x10001000 && put 48 32 0x10002000 && put 28 16 1 || return 1
    # It needs a reset now, and the IOMMU's driver has heard why.
    test $(($(devmem $((base + 20)) 8) & 64)) = 64 || return 1
    for try in $(seq 1 50); do
        dmesg | grep 'page fault from EP .* at 0x10000000 \[R' && return 0
        usleep 100000
    done
    dmesg | tail -n 5
    return 1
}

for name in groups disk network; do
    check $name
done
[ -z "$RNG" ] || check outside
