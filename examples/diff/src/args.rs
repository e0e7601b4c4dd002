//! The command line.

use alloc::boxed::Box;
use core::error::Error;
use core::ops::Range;

/// What the command line asks for: `count=N seed=S from=INDEX only=INDEX trace`.
#[derive(Clone, Debug)]
pub struct Args {
    /// Where the random numbers begin.
    pub seed: u64,
    /// Whether to print each case before it is tried, which shows the last one of an emulator that
    /// dies.
    pub trace: bool,
    count: u64,
    from: u64,
    only: Option<u64>,
}

impl Args {
    /// Parses it.
    ///
    /// # Errors
    ///
    /// A word that is none of these, or no number where one belongs.
    pub fn parse(line: &str) -> Result<Self, Box<dyn Error>> {
        let mut args = Self {
            seed: 1,
            trace: false,
            count: 10_000,
            from: 0,
            only: None,
        };
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("count", number)) => args.count = number.parse()?,
                Some(("seed", number)) => args.seed = number.parse()?,
                Some(("from", number)) => args.from = number.parse()?,
                Some(("only", number)) => args.only = Some(number.parse()?),
                None if word == "trace" => args.trace = true,
                _ => return Err("write `count=N seed=S from=INDEX only=INDEX trace`".into()),
            }
        }
        Ok(args)
    }

    /// The numbers of the cases to try.
    pub fn indices(&self) -> Range<u64> {
        match self.only {
            Some(index) => index..index.saturating_add(1),
            None => self.from..self.from.saturating_add(self.count),
        }
    }

    /// How many cases there are.
    pub fn count(&self) -> u64 {
        let indices = self.indices();
        indices.end - indices.start
    }

    /// Whether one case alone is to be tried.
    pub fn is_single(&self) -> bool {
        self.only.is_some()
    }
}
