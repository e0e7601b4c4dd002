# Run by two guests on one switch: each serves what the other fetches.
me=$(cut -d: -f6 /sys/class/net/eth0/address)
other=$((113 - me)) # 56 and 57
ip link set eth0 up
ip addr add 192.168.7.$me/24 dev eth0
mkdir /tmp/www
seq 1 200000 >/tmp/www/numbers
httpd -h /tmp/www
for try in $(seq 1 100); do
    wget -q -O /tmp/got http://192.168.7.$other/numbers && break
    usleep 100000
done
cmp /tmp/got /tmp/www/numbers && echo "all $(wc -l </tmp/got) lines from the neighbour"
touch /tmp/www/done
for try in $(seq 1 100); do
    wget -q -O /tmp/done http://192.168.7.$other/done && break
    usleep 100000
done
sleep 1 # until the neighbour has seen ours too
test -f /tmp/done
