"""What is kept: session records, events and mailboxes; each contract with its twin in memory."""
