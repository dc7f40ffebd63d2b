# SPDX-License-Identifier: Apache-2.0
"""The only code that touches the extension: system calls by name, owned descriptors, namespaces."""
