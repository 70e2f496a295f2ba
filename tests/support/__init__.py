"""What tests of several layers share: real servers, and waiting for conditions."""
