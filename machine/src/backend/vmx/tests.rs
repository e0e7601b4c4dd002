//! The backend over a processor that is none.
