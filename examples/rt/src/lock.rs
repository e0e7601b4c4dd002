//! A spin lock that keeps interrupts off while it is held.

use core::ops::{Deref, DerefMut};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use x86_64::instructions::interrupts;

/// Data that several processors and their interrupt handlers share.
///
/// Interrupts are off while the lock is held and return to what they were, so a handler that takes the
/// same lock on the same processor cannot deadlock, and nothing is enabled that was not.
pub struct Lock<T: ?Sized>(SpinMutex<T>);

impl<T> Lock<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(SpinMutex::new(value))
    }
}

impl<T: ?Sized> Lock<T> {
    /// Waits for the lock.
    pub fn lock(&self) -> Guard<'_, T> {
        let restore = interrupts::are_enabled();
        interrupts::disable();
        Guard {
            inner: Some(self.0.lock()),
            restore,
        }
    }

    /// Takes the lock if nobody holds it.
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        let restore = interrupts::are_enabled();
        interrupts::disable();
        let inner = self.0.try_lock();
        if inner.is_none() && restore {
            interrupts::enable();
        }
        inner.map(|inner| Guard {
            inner: Some(inner),
            restore,
        })
    }
}

/// The right to the data; dropping it unlocks first and restores the interrupt flag second.
pub struct Guard<'a, T: ?Sized> {
    inner: Option<SpinMutexGuard<'a, T>>,
    restore: bool,
}

impl<T: ?Sized> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.inner {
            Some(inner) => inner,
            None => unreachable!("the guard is emptied only when it is dropped"),
        }
    }
}

impl<T: ?Sized> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.inner {
            Some(inner) => inner,
            None => unreachable!("the guard is emptied only when it is dropped"),
        }
    }
}

impl<T: ?Sized> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.inner = None;
        if self.restore {
            interrupts::enable();
        }
    }
}
