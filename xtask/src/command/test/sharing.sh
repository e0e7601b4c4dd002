# Runs in guests of 512 MiB that share pages, whose host listens on socket port 9.

# The number that the host's report has in front of some words.
number() {
    echo report | vsock-pipe 2 9 | sed -n "s/.* \([0-9]*\) $1.*/\1/p"
}

# The frames that are this guest's alone, and how often pages of it were shared and then written.
own() {
    number "frames, "
}
joined() {
    number "times a page came to share"
}
written() {
    number "times it was written"
}

# Waits until a number is on the given side of another: $1 of own and joined, $2 of -lt and -gt.
until_is() {
    for try in $(seq 1 600); do
        test "$($1)" $2 $3 && return 0
        usleep 100000
    done
    echo "$1: $($1), not $2 $3"
    return 1
}

# Waits until no more pages are shared, but for those that this script uses up.
until_settled() {
    last=$(own)
    for try in $(seq 1 60); do
        sleep 1
        now=$(own)
        test $((last - now)) -lt 200 && return 0
        last=$now
    done
    echo "still fewer: $now frames"
    return 1
}

# 48 MiB, or 12288 pages, of which no two are alike.
stream() {
    for time in $(seq 1 24); do
        cat /t/piece
    done
}

# Of 131072 frames few are left: most pages are zeros.
pages_are_shared() {
    until_is own -lt 45000 && until_settled
}

# What is written was shared before, and is what was written. Some of the pages had been used already.
writers_get_their_own() {
    before=$(written) && stream >/t/big && after=$(written) && sum=$(stream | md5sum) || return 1
    echo "written $before times before, $after after"
    test $((after - before)) -gt 6000 && test "$(md5sum </t/big)" = "$sum"
}

# The pages of a copy are those of the original: it needs no frames.
copies_are_shared() {
    before=$(own) && shared=$(joined) && cp /t/big /t/copy || return 1
    until_is joined -gt $((shared + 9000)) && until_is own -lt $((before + 3000)) || return 1
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
