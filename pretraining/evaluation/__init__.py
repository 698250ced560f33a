"""What came out of pre-training: exact loss, trace of the Hessian, transfer."""
