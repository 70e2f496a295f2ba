"""What an era needs and the other has not: which one a server speaks, and the bridges."""
