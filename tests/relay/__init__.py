"""The relay: mailboxes, channels, leases, and children that are served to other replicas."""
