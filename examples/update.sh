#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# An update script: swap the content of a directory, and act on the outcome.
#
#   update.sh /etc /data/etc-42.img
set -u

target=$1
image=$2

tuckctl swap --busy wait --timeout 10 "$target" "$image"
code=$?
case $code in
    0) echo "$target: updated" ;;
    4) echo "$target: still in use, the content before is live; trying again later" ;;
    5) echo "$target: the image is damaged, nothing was touched" ;;
    6) echo "$target: updated, but not for everybody" ; tuckctl status "$target" ;;
    *) echo "$target: not updated (exit $code)" ;;
esac
exit $code
