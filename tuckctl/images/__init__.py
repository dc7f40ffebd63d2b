# SPDX-License-Identifier: Apache-2.0
"""What supplies a layer: an erofs, squashfs or ext4 filesystem, or a directory; opened, checked, kept, mounted."""

from tuckctl.images.digests import Progress
from tuckctl.images.mounting import mount_image
from tuckctl.images.opening import Image, open_image, reopen_image
from tuckctl.images.store import Store

__all__ = ["Image", "Progress", "Store", "mount_image", "open_image", "reopen_image"]
