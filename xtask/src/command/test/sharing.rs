//! Guests that share pages: what they write is theirs, and what they have alike is there once.

use anyhow::{Context, Result, ensure};

use super::Tally;
use super::virtio::boot;
use crate::run;

const CHECKS: [&str; 4] = [
    "pages_are_shared",
    "writers_get_their_own",
    "copies_are_shared",
    "the_other_stays",
];

/// How many frames two guests save at least, and how many shared pages they write.
const SAVED: u64 = 50_000;
const WRITTEN: u64 = 20_000;

/// Boots guests that share pages.
pub(super) fn run(tally: &mut Tally) {
    run::progress("guests that share pages");
    tally.check("sharing::two_guests", || guests(2, 1));
    tally.check("sharing::two_processors", || guests(1, 2));
    tally.check("sharing::on_shadow_paging_is_an_error", on_shadow_paging);
}

fn guests(count: usize, vcpus: usize) -> Result<()> {
    let (guests, vcpus) = (count.to_string(), vcpus.to_string());
    let arguments = ["--guests", &guests, "--vcpus", &vcpus, "--vsock", "--stats"];
    let arguments = [&arguments[..], &["--share-pages", "50000"]].concat();
    let output = boot(&arguments, include_str!("sharing.sh"))?;
    for what in CHECKS {
        let passed = output.matches(&format!("check {what} ok")).count();
        ensure!(
            passed == count,
            "{what} passed in {passed} guests; the output was:\n{output}"
        );
    }
    let least = SAVED / 2 * count as u64;
    let saved = number_before(&output, " frames saved")?;
    ensure!(saved >= least, "{saved} frames were saved, not {least}");
    let written = number_before(&output, " written since")?;
    let least = WRITTEN / 2 * count as u64;
    ensure!(written >= least, "{written} were written, not {least}");
    Ok(())
}

/// The number in front of some words.
fn number_before(output: &str, words: &str) -> Result<u64> {
    let number = || {
        let (before, _) = output.split_once(words)?;
        before.rsplit(' ').next()?.parse().ok()
    };
    number().with_context(|| format!("no number before «{words}»:\n{output}"))
}

fn on_shadow_paging() -> Result<()> {
    let refused = boot(&["--paging", "shadow", "--share-pages"], "true");
    let error = refused.err().map(|error| error.to_string());
    let error = error.context("the guest ran")?;
    ensure!(
        error.contains("on nested paging only"),
        "the output was:\n{error}"
    );
    Ok(())
}
