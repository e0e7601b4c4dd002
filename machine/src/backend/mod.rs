//! The processor modes behind [`Vcpu`](crate::Vcpu).

#[cfg(feature = "svm")]
pub mod svm;
