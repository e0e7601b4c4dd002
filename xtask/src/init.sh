#!/bin/busybox sh
# The first process of the default initial RAM disk.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=${TERM:-vt100}
for module in $(cat /etc/modules); do
    modprobe "$module" || echo "init: no module $module"
done
cd /root
if [ -f /run.sh ]; then
    sh /run.sh
    status=$?
    # The debug-exit port takes the status out of the machine.
    printf "\\$(printf %03o $status)" | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
else
    echo "A guest of Testudo. 'exit' or Ctrl-D powers it off."
    setsid cttyhack sh
fi
poweroff -f
