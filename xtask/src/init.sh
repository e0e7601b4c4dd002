#!/bin/busybox sh
# The first process of the default initial RAM disk.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=${TERM:-vt100}
# Memory that is plugged is to be used, and to be given back whole.
auto=/sys/devices/system/memory/auto_online_blocks
[ ! -e "$auto" ] || echo online_movable >"$auto"
for module in $(cat /etc/modules); do
    grep -q "^$module.ko:" "/lib/modules/$(uname -r)/modules.dep" 2>/dev/null || continue # built in
    modprobe "$module" || echo "init: cannot load $module"
done
cd /root
if [ -f /run.sh ]; then
    sh /run.sh
    status=$?
    exit-port $status
else
    echo "A guest of Testudo. 'exit' or Ctrl-D powers it off."
    setsid cttyhack sh
fi
poweroff -f
