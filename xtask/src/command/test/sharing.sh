# Runs in guests of 512 MiB that share pages, whose host listens on socket port 9. Each check ends with a line
# `check NAME ok` or `check NAME FAILED`.
check() {
    if "$1" >/tmp/log 2>&1; then
        echo "check $1 ok"
    else
        echo "check $1 FAILED"
        cat /tmp/log
    fi
}

# The frames that are this guest's alone.
own() {
    echo report | vsock-pipe 2 9 | sed -n 's/.*guest has \([0-9]*\) frames.*/\1/p'
}

# Waits until they are fewer than that.
until_fewer() {
    for try in $(seq 1 300); do
        test "$(own)" -lt "$1" && return 0
        usleep 100000
    done
    echo "$(own) frames, not less than $1"
    return 1
}

# 48 MiB in which no two pages are alike.
stream() {
    for time in $(seq 1 24); do
        cat /t/piece
    done
}

# Of 131072 frames few are left: most pages are zeros.
pages_are_shared() {
    until_fewer 45000
}

# What is written is in frames of the guest's own, and is what was written.
writers_get_their_own() {
    before=$(own) && stream >/t/big && after=$(own) && sum=$(stream | md5sum) || return 1
    echo "$before frames before, $after after"
    # Meanwhile others of its pages may have been shared.
    test $((after - before)) -gt 6000 && test "$(md5sum </t/big)" = "$sum"
}

# The pages of a copy are those of the original.
copies_are_shared() {
    cp /t/big /t/copy && with=$(own) && until_fewer $((with - 9000)) || return 1
    test "$(md5sum </t/big)" = "$sum" && test "$(md5sum </t/copy)" = "$sum"
}

# One is written, and the other stays what it is.
the_other_stays() {
    dd if=/dev/zero of=/t/copy bs=1M seek=8 count=32 conv=notrunc && test "$(md5sum </t/big)" = "$sum" || return 1
    test "$(dd if=/t/copy bs=1M skip=8 count=32 | tr -d '\000' | wc -c)" = 0 || return 1
    cp /t/copy /t/third && cp /t/big /t/copy && test "$(md5sum </t/copy)" = "$sum" || return 1
    test "$(dd if=/t/third bs=1M skip=40 | md5sum)" = "$(dd if=/t/big bs=1M skip=40 | md5sum)"
}

mkdir /t && mount -t tmpfs -o size=200m t /t
seq 1 300000 | head -c 2097000 >/t/piece
printf '%104d' 0 >>/t/piece
for name in pages_are_shared writers_get_their_own copies_are_shared the_other_stays; do
    check $name
done
