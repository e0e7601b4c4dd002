# Runs in a guest of 512 MiB with a balloon and 256 MiB to plug, whose host listens on socket port 9.

ask() {
    echo "$1" | vsock-pipe 2 9
}

# The frames that the guest has, or that the host has free.
guest() {
    ask report | sed -n 's/.*guest has \([0-9]*\) frames.*/\1/p'
}
host() {
    ask report | sed -n 's/.*host has \([0-9]*\) free.*/\1/p'
}

total() {
    awk '/^MemTotal/ { print $2 }' /proc/meminfo
}

# Waits until the host says so.
until_host_says() {
    for try in $(seq 1 100); do
        ask report | grep "$1" && return 0
        usleep 100000
    done
    ask report
    return 1
}

plugged() {
    ask "mem $1" && until_host_says "mem: $1 MiB of 256 are plugged"
}

# What is unplugged is the host's again.
mem_goes() {
    plugged 256 && sleep 1 && with=$(total) && before=$(host) && ls /sys/devices/system/memory || return 1
    plugged 0 || return 1
    without=$(total)
    echo "$with kB with it, $without kB without; the host had $before frames free, and has $(host)"
    test $((with - without)) = 262144 && test $(host) -gt $((before + 60000))
}

mem_comes() {
    plugged 128 && sleep 1 && test $(($(total) - without)) = 131072 && ls /sys/devices/system/memory/memory32/ || return 1
    # The guest uses it: what is moved there stays what it is.
    mkdir -p /t && mount -t tmpfs -o size=300m t /t && seq 1 100000 >/t/numbers && seq 1 100000 | cmp - /t/numbers
}

# What is reported free leaves the guest, and so does what is inflated.
free_pages_go() {
    for try in $(seq 1 100); do
        test "$(guest)" -lt 60000 && return 0
        usleep 100000
    done
    ask report
    return 1
}

balloon_inflates() {
    ask "balloon 128" && until_host_says '^balloon: 128 MiB held, 128 MiB by' || return 1
    grep 'balloon_inflate 32768' /proc/vmstat
}

balloon_deflates() {
    ask "balloon 0" && until_host_says '^balloon: 0 MiB held, 0 MiB by' && grep 'balloon_deflate 32768' /proc/vmstat
}

# What the guest gave away comes back when it is touched, and what is written there stays.
memory_returns() {
    before=$(guest)
    dd if=/dev/zero of=/t/zeros bs=1M count=160 && seq 1 300000 >/t/more || return 1
    echo "the guest had $before frames, and has $(guest)"
    test "$(guest)" -gt $((before + 35000)) && seq 1 300000 | cmp - /t/more && seq 1 100000 | cmp - /t/numbers
}

for name in mem_goes mem_comes free_pages_go balloon_inflates balloon_deflates memory_returns; do
    check $name
done
