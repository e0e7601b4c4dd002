//! What a test case is.

use alloc::string::String;

use testudo_rt::Boot;

/// A named test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&'static Boot) -> Outcome,
}

/// How a test ended.
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    /// The machine lacks what the test is about.
    Skipped(&'static str),
}

/// Ends a case as failed unless the condition holds; further arguments say what was found.
macro_rules! check {
    ($condition:expr) => { check!($condition, "{}", stringify!($condition)) };
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return $crate::case::Outcome::Failed(alloc::format!($($message)+));
        }
    };
}

/// Ends a case as failed unless the two are equal.
macro_rules! check_eq {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) => check!(
                left == right,
                "{} is {left:x?}, not {right:x?}",
                stringify!($left)
            ),
        }
    };
}

pub(crate) use {check, check_eq};
