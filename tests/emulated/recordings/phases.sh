# SPDX-License-Identifier: GPL-2.0-or-later
# What the guest does whose accesses are recorded, in phases that it announces on the serial
# console. Nothing else is printed: each character there is an interrupt or two.
SERIAL=/sys/block/vda/serial # reading it is a request that the disk completes at once
LOAD="qvis-load $SERIAL"

phase() {
    echo "qvis-phase: $*"
    usleep 100000 # until the line is out
}

disk() {
    for device in /sys/bus/virtio/devices/*; do
        [ "$(basename $(readlink $device/driver))" = virtio_blk ] && basename $device
    done
}

# The interrupt of the disk's second queue, or of all of the disk.
interrupt() {
    grep -e "$1-req.1\$" -e " $1\$" /proc/interrupts | sed 's/:.*//' | tr -d ' '
}

D=$(disk)
I=$(interrupt $D)
CHIP=/sys/kernel/debug/irq/irqs/$I
AFFINITY=/proc/irq/$I/smp_affinity_list

phase interrupts
echo 1 > $AFFINITY
$LOAD 1 1000 > /dev/null

phase mask
i=0
while [ $i -lt 20 ]; do
    echo mask > $CHIP
    echo unmask > $CHIP
    i=$((i + 1))
done

phase pending
i=0
while [ $i -lt 5 ]; do
    echo mask > $CHIP
    $LOAD 1 1 > /dev/null &
    usleep 20000
    echo unmask > $CHIP
    wait
    i=$((i + 1))
done

phase move
i=0
while [ $i -lt 20 ]; do
    echo $((i % 4)) > $AFFINITY
    $LOAD 1 1 > /dev/null
    usleep 30000
    i=$((i + 1))
done

phase move pending
i=0
while [ $i -lt 5 ]; do
    echo mask > $CHIP
    $LOAD 1 1 > /dev/null &
    usleep 20000
    echo $((i % 4)) > $AFFINITY
    echo unmask > $CHIP
    wait
    usleep 30000
    i=$((i + 1))
done

phase unbind
echo $D > /sys/bus/virtio/drivers/virtio_blk/unbind

phase bind
echo $D > /sys/bus/virtio/drivers/virtio_blk/bind
$LOAD 1 10 > /dev/null

phase remove
P=$(readlink -f /sys/bus/virtio/devices/$D/..)
N=$(basename $P)
R=$(readlink -f $P/driver)
echo $N > $R/unbind

phase add
echo $N > $R/bind
$LOAD 1 10 > /dev/null
$LOAD 3 10 > /dev/null

phase control
ifconfig eth0 promisc
ifconfig eth0 -promisc

phase end
