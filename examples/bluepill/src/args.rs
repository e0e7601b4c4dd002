//! The program's own command line: `no-nesting -- guest command line`.

use core::fmt;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Args<'a> {
    /// Whether the guest may be a hypervisor itself.
    pub(crate) nesting: bool,
    /// The guest's command line.
    pub(crate) guest: &'a str,
}

/// A word that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadWord<'a>(&'a str);

impl fmt::Display for BadWord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is not understood; write `[no-nesting] -- GUEST COMMAND LINE`",
            self.0
        )
    }
}

impl<'a> Args<'a> {
    /// Reads the words before `--`; the rest belongs to the guest.
    pub(crate) fn parse(line: &'a str) -> Result<Self, BadWord<'a>> {
        let (own, guest) = match line.split_once("--") {
            Some((own, guest)) => (own, guest.trim()),
            None => (line, ""),
        };
        let mut args = Self {
            nesting: true,
            guest,
        };
        for word in own.split_whitespace() {
            match word {
                "no-nesting" => args.nesting = false,
                _ => return Err(BadWord(word)),
            }
        }
        Ok(args)
    }
}
