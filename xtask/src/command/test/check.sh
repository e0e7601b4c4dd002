# Runs a function of the script that follows, and says `check NAME ok`, or `check NAME FAILED` and what it said.
check() {
    if "$1" >/tmp/log 2>&1; then
        echo "check $1 ok"
    else
        echo "check $1 FAILED"
        cat /tmp/log
    fi
}
