//! The program's own command line: `memory=MIB vcpus=N guests=N nested enlightened renew=TURNS paging=nested|shadow,... share-pages=PAGES timeout=SECONDS stats verbose -- guest command line`.

use core::fmt;
use core::num::NonZeroU32;

use testudo_machine::paging::Paging;

use crate::devices::args::DeviceArgs;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Args<'a> {
    /// The memory of each guest in MiB.
    pub(crate) memory_mib: u64,
    /// The number of each guest's virtual processors.
    pub(crate) vcpus: usize,
    /// The number of guests, all alike.
    pub(crate) guests: usize,
    /// Whether the guest may be a hypervisor itself.
    pub(crate) nested: bool,
    /// Whether it is offered enlightened VMCSs.
    pub(crate) enlightened: bool,
    /// After how many turns each that an interrupt ended, its nested state is saved and restored.
    pub(crate) renew: Option<NonZeroU32>,
    /// How the memory of each guest is put behind its paging, the last word being for all further
    /// ones too; nothing takes what the processor has.
    paging: &'a str,
    /// How many pages of each guest are looked at in a second, to be shared with equal ones of any guest;
    /// nothing shares none.
    pub(crate) share_pages: Option<u64>,
    /// How many seconds the guest may run.
    pub(crate) timeout_s: Option<u64>,
    /// Whether to print what the exits cost.
    pub(crate) stats: bool,
    /// Whether to say what is done.
    pub(crate) verbose: bool,
    /// The virtio devices.
    pub(crate) devices: DeviceArgs,
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
            "`{}` is not understood; write `memory=MIB vcpus=N guests=N nested enlightened renew=TURNS paging=nested|shadow,... share-pages=PAGES timeout=SECONDS stats verbose DEVICES -- GUEST COMMAND LINE`, \
             DEVICES being of `{}`",
            self.0,
            DeviceArgs::USAGE
        )
    }
}

impl<'a> Args<'a> {
    /// Reads the words before `--`; the rest belongs to the guest.
    pub(crate) fn parse(line: &'a str) -> Result<Self, BadWord<'a>> {
        let mut args = Self {
            memory_mib: 512,
            vcpus: 1,
            guests: 1,
            nested: false,
            enlightened: false,
            renew: None,
            paging: "",
            share_pages: None,
            timeout_s: None,
            stats: false,
            verbose: false,
            devices: DeviceArgs::NONE,
            guest: "",
        };
        let mut rest = line.trim();
        while !rest.is_empty() {
            let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = tail.trim_start();
            let bad = Err(BadWord(word));
            match word.split_once('=') {
                None if word == "--" => {
                    args.guest = rest;
                    break;
                }
                None if word == "nested" => args.nested = true,
                None if word == "enlightened" => args.enlightened = true,
                Some(("paging", list)) if list.split(',').all(|word| paging(word).is_some()) => {
                    args.paging = list;
                }
                None if word == "stats" => args.stats = true,
                None if word == "verbose" => args.verbose = true,
                Some(("renew", turns)) => match turns.parse() {
                    Ok(turns) => args.renew = Some(turns),
                    _ => return bad,
                },
                Some(("memory", mib)) => match mib.parse() {
                    Ok(mib) if mib > 0 && mib <= 1 << 24 => args.memory_mib = mib,
                    _ => return bad,
                },
                Some(("share-pages", pages)) => match pages.parse() {
                    Ok(pages) if pages > 0 => args.share_pages = Some(pages),
                    _ => return bad,
                },
                Some(("timeout", seconds)) => match seconds.parse() {
                    Ok(seconds) => args.timeout_s = Some(seconds),
                    _ => return bad,
                },
                Some(("vcpus", count)) => match count.parse() {
                    Ok(count) if count > 0 => args.vcpus = count,
                    _ => return bad,
                },
                Some(("guests", count)) => match count.parse() {
                    Ok(count) if count > 0 => args.guests = count,
                    _ => return bad,
                },
                _ if args.devices.take(word) => {}
                _ => return bad,
            }
        }
        Ok(args)
    }

    /// How the memory of this guest is put behind its paging; `None` takes what the processor has.
    pub(crate) fn paging(&self, guest: usize) -> Option<Paging> {
        let mut words = self.paging.split(',');
        let word = words.clone().nth(guest).or_else(|| words.next_back())?;
        paging(word)
    }
}

fn paging(word: &str) -> Option<Paging> {
    match word {
        "nested" => Some(Paging::Nested),
        "shadow" => Some(Paging::Shadow),
        _ => None,
    }
}
