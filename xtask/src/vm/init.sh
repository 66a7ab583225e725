#!/bin/busybox sh
# The first process in the virtual machine: puts a root together from the machine outside, which is
# shared read-only, and memory for what changes. Then `cargo xtask vm-guest` goes on in it.
export PATH=/bin

fail() {
    echo "init: $*"
    busybox poweroff -f
}

busybox mount -t proc proc /proc || fail 'there is no /proc'
for module in /modules/*; do
    busybox insmod "$module" || fail "cannot load $module"
done
busybox mount -t virtiofs -o ro root /lower || fail 'the shared root cannot be mounted'
# A folder of the machine outside is the root where its own programs are for another processor.
busybox mount --bind "/lower$(busybox cat /system)" /system-root || fail 'there is no such root'
busybox mount -t tmpfs -o size=75% upper /upper || fail 'no tmpfs'
busybox mkdir /upper/changes /upper/work
busybox mount -t overlay -o lowerdir=/system-root,upperdir=/upper/changes,workdir=/upper/work overlay /root ||
    fail 'the root cannot be put together'
# The folders that such a root has from outside.
while read -r folder; do
    busybox mkdir -p "/root$folder"
    busybox mount --bind "/lower$folder" "/root$folder" || fail "there is no $folder"
done </folders
# The overlay has mounts of its own of both: nobody in there reaches what lies below.
busybox umount -l /system-root /lower /upper
guest=$(busybox cat /guest)
busybox umount /proc
exec busybox switch_root /root "$guest" vm-guest
