//! What a machine asks of the program that runs it.

/// The world outside a machine: time, and the processors or threads that its vCPUs run on.
///
/// Time is counted in nanoseconds from an arbitrary start and never runs backwards. vCPUs are
/// numbered from zero; vCPU `n` always runs on the same processor or thread.
pub trait Host: Send + Sync {
    /// The time now, in nanoseconds.
    fn now(&self) -> u64;

    /// The host's time-stamp counter now.
    fn tsc(&self) -> u64;

    /// The frequency of the time-stamp counter, in Hz.
    fn tsc_hz(&self) -> u64;

    /// Makes the vCPU leave guest mode, or its next [`wait`](Self::wait) return, soon. What it
    /// shall find was stored before (release); a kick that finds it outside is remembered.
    fn kick(&self, vcpu: usize);

    /// Has the calling vCPU kicked at `deadline` (nanoseconds), replacing any earlier order;
    /// `None` takes the order back.
    ///
    /// The kick comes when [`now`](Self::now) has reached the deadline, never before: the order is
    /// not given again as long as the deadline stays the same.
    fn set_timer(&self, deadline: Option<u64>);

    /// Blocks the calling vCPU until it is kicked, if no kick came since it last ran.
    fn wait(&self);
}
