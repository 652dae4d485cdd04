//! The replay window: a batch that is sent again gets its recorded answer.
//!
//! A session numbers its batches from 1. The module keeps the answers of the last numbers, so that
//! a caller that lost a reply sends the same number again and learns what the first one did. The
//! lock of a session is held while a batch runs: a number that is in work on another connection is
//! waited for, and then recalled.
//!
//! Invariants
//! - R1  A number runs at most once. What cannot be told apart from a number that ran is refused:
//!   numbers below the window, and any number but 1 in a session that is not known (forgotten, or
//!   of an earlier instance).
//! - R2  A session that somebody holds is not forgotten.
//! - R3  Of a session that was ended nothing runs any more, and no session of that name begins.
//! - R4  Answers take no more memory than they may ([`ReplayMemory`]). Room is taken before a batch
//!   runs; without it the batch is refused and has not run. An answer goes when its number is
//!   acknowledged or leaves the window, and with its session: one that nobody holds, and that was
//!   not used for [`ABANDONED_AFTER`], goes when the room is needed.

mod memory;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mirror_proto::module::Chain;
use tdx_defs::SeamcallResult;
use tokio::sync::OwnedMutexGuard;

use crate::batch::Ticket;
use crate::status::Refusal;

pub(crate) use memory::{ReplayMemory, Room, bytes_of};

/// When a session that nobody holds counts as left behind by its caller. One that lost its connection
/// is back long before.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// One session: its window, locked while one of its batches runs (S3).
pub(crate) type Session = Arc<tokio::sync::Mutex<Window>>;

/// All sessions, the least recently used forgotten first.
#[derive(Debug)]
pub(crate) struct Sessions {
    // A standard mutex: held to look up and to insert, never across an await.
    table: Mutex<Table>,
    capacity: usize,
    window: u64,
    memory: Arc<ReplayMemory>,
    instance: String,
}

/// Prefixes of ended sessions that are remembered. A caller that is gone has sent all that it ever
/// will, so it is not for long that one is needed.
const MAX_ENDED: usize = 64;

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<String, Entry>,
    /// R3, oldest first.
    ended: VecDeque<String>,
    /// Counts look-ups; orders `Entry::used`.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    session: Session,
    used: u64,
}

impl Sessions {
    /// Remembers up to `capacity` sessions with `window` answers each, in `memory`.
    pub(crate) fn new(
        capacity: usize,
        window: u32,
        memory: Arc<ReplayMemory>,
        instance: String,
    ) -> Self {
        Self {
            table: Mutex::default(),
            capacity,
            window: window.into(),
            memory,
            instance,
        }
    }

    /// Room for the answer of a batch that has not run, with `calls` calls.
    pub(crate) fn room(
        &self,
        window: &Window,
        ticket: &Ticket,
        calls: usize,
    ) -> Result<Room, Refusal> {
        let bytes = bytes_of(calls);
        let limit = self.memory.session_limit;
        let mut held = window.bytes;
        if held.saturating_add(bytes) > limit {
            held = window.bytes_beside(ticket);
        }
        if held.saturating_add(bytes) > limit {
            return Err(Refusal::ReplayFull {
                what: "answers of the session that are not acknowledged",
                held,
                limit,
            });
        }
        loop {
            if let Some(room) = self.memory.take(bytes) {
                return Ok(room);
            }
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            table
                .forget_abandoned(Instant::now())
                .ok_or_else(|| Refusal::ReplayFull {
                    what: "answers of all sessions that are not acknowledged",
                    held: self.memory.taken(),
                    limit: self.memory.limit,
                })?;
        }
    }

    /// Bytes that recorded answers take.
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.taken()
    }

    /// The session of a ticket; a new one for number 1.
    pub(crate) fn open(&self, ticket: &Ticket) -> Result<Session, Refusal> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.clock += 1;
        let used = table.clock;
        if let Some(entry) = table.sessions.get_mut(&ticket.session) {
            entry.used = used;
            return Ok(entry.session.clone());
        }
        if table.has_ended(&ticket.session) {
            return Err(Refusal::SessionEnded {
                session: ticket.session.clone(),
            });
        }
        if ticket.sequence != 1 {
            return Err(Refusal::UnknownSession {
                session: ticket.session.clone(),
                sequence: ticket.sequence,
                instance: self.instance.clone(),
            });
        }
        if table.sessions.len() >= self.capacity {
            table.forget_one().ok_or(Refusal::TooManySessions {
                limit: self.capacity,
            })?;
        }
        let session = Session::new(tokio::sync::Mutex::new(Window::new(self.window)));
        let entry = Entry {
            session: session.clone(),
            used,
        };
        table.sessions.insert(ticket.session.clone(), entry);
        Ok(session)
    }

    /// A new session that its caller holds until it is done: for something that is no batch.
    pub(crate) fn hold(&self, name: &str) -> Result<OwnedMutexGuard<Window>, Refusal> {
        let ticket = Ticket {
            session: name.to_owned(),
            sequence: 1,
            fingerprint: 0,
            acknowledged: 0,
        };
        let mut window = self
            .open(&ticket)?
            .try_lock_owned()
            .map_err(|_| Refusal::SequenceReused { sequence: 1 })?;
        if window.recall(&ticket)?.is_some() {
            return Err(Refusal::SequenceReused { sequence: 1 });
        }
        let room = self.room(&window, &ticket, 0)?;
        // The name is used up.
        window.record(&ticket, Vec::new(), room);
        Ok(window)
    }

    /// Ends every session whose name begins with `prefix`. When this returns, nothing of theirs is
    /// in work; how many there were.
    pub(crate) async fn end(&self, prefix: &str) -> usize {
        let found: Vec<Session> = {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            if !table.ended.iter().any(|ended| ended == prefix) {
                table.ended.push_back(prefix.to_owned());
                if table.ended.len() > MAX_ENDED {
                    table.ended.pop_front();
                }
            }
            let names = table
                .sessions
                .extract_if(|name, _| name.starts_with(prefix));
            names.map(|(_, entry)| entry.session).collect()
        };
        for session in &found {
            session.lock().await.has_ended = true;
        }
        found.len()
    }

    /// The run of the module that the sessions belong to.
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }
}

impl Table {
    /// R3.
    fn has_ended(&self, name: &str) -> bool {
        self.ended.iter().any(|prefix| name.starts_with(&**prefix))
    }

    /// Forgets the least recently used session that nobody holds.
    fn forget_one(&mut self) -> Option<()> {
        let (oldest, _) = self
            .sessions
            .iter()
            .filter(|(_, entry)| Arc::strong_count(&entry.session) == 1)
            .min_by_key(|(_, entry)| entry.used)?;
        let oldest = oldest.clone();
        self.sessions.remove(&oldest);
        Some(())
    }

    /// Forgets the least recently used session with answers that nobody comes back for.
    fn forget_abandoned(&mut self, now: Instant) -> Option<()> {
        let abandoned = self.sessions.iter().filter(|(_, entry)| {
            let window = entry.session.try_lock();
            Arc::strong_count(&entry.session) == 1
                && window.is_ok_and(|window| window.is_abandoned(now))
        });
        let (oldest, _) = abandoned.min_by_key(|(_, entry)| entry.used)?;
        let oldest = oldest.clone();
        self.sessions.remove(&oldest);
        Some(())
    }
}

/// The answers of one session's last numbers.
#[derive(Debug)]
pub(crate) struct Window {
    /// How many numbers it spans.
    size: u64,
    /// Highest number that ran.
    highest: u64,
    /// R3.
    has_ended: bool,
    /// The last link of a chain that ran, if it ran whole.
    chain: Option<Chain>,
    /// Highest number whose answer has arrived.
    acknowledged: u64,
    answers: BTreeMap<u64, Answer>,
    /// Of the answers.
    bytes: u64,
    /// When its last batch ran.
    used: Instant,
}

#[derive(Debug)]
struct Answer {
    fingerprint: u64,
    results: Vec<SeamcallResult>,
    room: Room,
}

impl Window {
    fn new(size: u64) -> Self {
        Self {
            size,
            highest: 0,
            has_ended: false,
            chain: None,
            acknowledged: 0,
            answers: BTreeMap::new(),
            bytes: 0,
            used: Instant::now(),
        }
    }

    /// The lowest number that the window still knows about.
    fn lowest(&self) -> u64 {
        self.lowest_with(self.highest)
    }

    /// The same when `highest` is the highest number that ran.
    fn lowest_with(&self, highest: u64) -> u64 {
        highest.saturating_sub(self.size).max(self.acknowledged) + 1
    }

    /// The caller has the answers up to this number.
    pub(crate) fn acknowledge(&mut self, ticket: &Ticket) {
        if ticket.acknowledged > self.acknowledged {
            self.acknowledged = ticket.acknowledged;
            self.forget_below();
        }
    }

    /// Bytes of the answers that stay when the batch of a ticket runs.
    fn bytes_beside(&self, ticket: &Ticket) -> u64 {
        let lowest = self.lowest_with(self.highest.max(ticket.sequence));
        let staying = self.answers.range(lowest..);
        staying.map(|(_, answer)| answer.room.bytes()).sum()
    }

    fn is_abandoned(&self, now: Instant) -> bool {
        !self.answers.is_empty() && now.duration_since(self.used) >= ABANDONED_AFTER
    }

    /// Forgets what is below the window.
    fn forget_below(&mut self) {
        let lowest = self.lowest();
        while let Some(entry) = self.answers.first_entry()
            && *entry.key() < lowest
        {
            self.bytes -= entry.remove().room.bytes();
        }
    }

    /// The recorded answer, or `None` for a number that has not run.
    pub(crate) fn recall(&self, ticket: &Ticket) -> Result<Option<&[SeamcallResult]>, Refusal> {
        let sequence = ticket.sequence;
        if self.has_ended {
            return Err(Refusal::SessionEnded {
                session: ticket.session.clone(),
            });
        }
        if sequence < self.lowest() {
            return Err(Refusal::BelowWindow {
                sequence,
                lowest: self.lowest(),
            });
        }
        match self.answers.get(&sequence) {
            None => Ok(None),
            Some(answer) if answer.fingerprint != ticket.fingerprint => {
                Err(Refusal::SequenceReused { sequence })
            }
            Some(answer) => Ok(Some(&answer.results)),
        }
    }

    /// Whether a batch at this place of a chain may run.
    pub(crate) fn goes_on(&self, chain: Option<Chain>) -> bool {
        chain.is_none_or(|Chain { id, link }| {
            let before = link.checked_sub(1).map(|link| Chain { id, link });
            before.is_none() || self.chain == before
        })
    }

    /// A link of a chain ran.
    pub(crate) fn link(&mut self, chain: Chain, whole: bool) {
        self.chain = whole.then_some(chain);
    }

    /// Keeps the answer of a batch that has run, in the room that was taken for it.
    pub(crate) fn record(&mut self, ticket: &Ticket, results: Vec<SeamcallResult>, mut room: Room) {
        // It may have ended before its last call.
        room.shrink(bytes_of(results.len()));
        self.used = Instant::now();
        self.highest = self.highest.max(ticket.sequence);
        self.bytes += room.bytes();
        self.answers.insert(
            ticket.sequence,
            Answer {
                fingerprint: ticket.fingerprint,
                results,
                room,
            },
        );
        self.forget_below();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(session: &str, sequence: u64) -> Ticket {
        Ticket {
            session: session.into(),
            sequence,
            fingerprint: sequence,
            acknowledged: 0,
        }
    }

    fn memory() -> Arc<ReplayMemory> {
        ReplayMemory::new(u64::MAX, u64::MAX)
    }

    fn sessions(capacity: usize, window: u32) -> Sessions {
        Sessions::new(capacity, window, memory(), "instance".into())
    }

    fn record(window: &mut Window, ticket: &Ticket, results: Vec<SeamcallResult>) {
        let room = memory().take(bytes_of(results.len())).unwrap();
        window.record(ticket, results, room);
    }

    fn answer(rax: u64) -> Vec<SeamcallResult> {
        vec![SeamcallResult {
            rax,
            ..SeamcallResult::default()
        }]
    }

    #[test]
    fn a_window_recalls_its_last_numbers_and_refuses_those_below() {
        let mut window = Window::new(3);
        for sequence in [1, 2, 4, 6] {
            assert_eq!(window.recall(&ticket("s", sequence)), Ok(None));
            record(&mut window, &ticket("s", sequence), answer(sequence));
        }
        for (sequence, expected) in [
            (
                3,
                Err(Refusal::BelowWindow {
                    sequence: 3,
                    lowest: 4,
                }),
            ),
            (4, Ok(Some(&answer(4)[..]))),
            (5, Ok(None)),
            (6, Ok(Some(&answer(6)[..]))),
            (7, Ok(None)),
            (u64::MAX, Ok(None)),
        ] {
            assert_eq!(
                window.recall(&ticket("s", sequence)),
                expected,
                "{sequence}"
            );
        }
    }

    #[test]
    fn a_link_goes_on_behind_the_link_before_it_and_nothing_else() {
        let at = |id, link| Chain { id, link };
        let mut window = Window::new(3);
        assert!(window.goes_on(None) && window.goes_on(Some(at(7, 0))));
        assert!(!window.goes_on(Some(at(7, 1))), "nothing ran");
        window.link(at(7, 0), true);
        for (chain, expected) in [
            (at(7, 0), true),
            (at(7, 1), true),
            (at(7, 2), false),
            (at(8, 1), false),
            (at(8, 0), true),
        ] {
            assert_eq!(window.goes_on(Some(chain)), expected, "{chain:?}");
        }
        window.link(at(7, 1), false);
        for link in [1, 2] {
            assert!(!window.goes_on(Some(at(7, link))), "{link} of a broken one");
        }
        window.link(at(7, 0), true);
        window.link(at(8, 0), true);
        assert!(!window.goes_on(Some(at(7, 1))), "another came between");
    }

    #[test]
    fn the_highest_number_of_all_is_a_number_too() {
        let mut window = Window::new(2);
        record(&mut window, &ticket("s", u64::MAX), answer(0));
        assert!(window.recall(&ticket("s", u64::MAX)).unwrap().is_some());
        assert!(window.recall(&ticket("s", u64::MAX - 2)).is_err());
    }

    #[test]
    fn a_number_with_other_content_is_refused() {
        let mut window = Window::new(3);
        record(&mut window, &ticket("s", 1), answer(1));
        let other = Ticket {
            fingerprint: 99,
            ..ticket("s", 1)
        };
        assert_eq!(
            window.recall(&other),
            Err(Refusal::SequenceReused { sequence: 1 })
        );
    }

    #[tokio::test]
    async fn an_ended_session_is_waited_for_and_runs_nothing_more() {
        let sessions = Arc::new(sessions(8, 4));
        let (mine, others) = (ticket("gone-s0", 1), ticket("here-s0", 1));
        let session = sessions.open(&mine).unwrap();
        let window = session.clone().lock_owned().await;
        let inside = sessions.hold("gone-g0").unwrap();
        assert!(sessions.hold("gone-g0").is_err(), "one at a time");
        let ending = {
            let sessions = Arc::clone(&sessions);
            async move { sessions.end("gone-").await }
        };
        let mut ending = by_hand(ending);
        assert!(!ending.poll(), "a batch is in work, a vCPU is inside");
        drop(window);
        assert!(!ending.poll());
        drop(inside);
        while !ending.poll() {}
        // Whoever kept it, and whoever comes late.
        let refusal = session
            .lock()
            .await
            .recall(&ticket("gone-s0", 2))
            .unwrap_err();
        assert!(matches!(refusal, Refusal::SessionEnded { .. }), "{refusal}");
        for late in ["gone-s0", "gone-s1", "gone-g1"] {
            assert!(sessions.open(&ticket(late, 1)).is_err(), "{late}");
            assert!(sessions.hold(late).is_err(), "{late}");
        }
        assert!(sessions.open(&others).is_ok());
    }

    /// A future that is polled by hand.
    struct Polled<T>(std::pin::Pin<Box<dyn Future<Output = T>>>, bool);

    fn by_hand<T: 'static>(future: impl Future<Output = T> + 'static) -> Polled<T> {
        Polled(Box::pin(future), false)
    }

    impl<T> Polled<T> {
        /// Whether it is done.
        fn poll(&mut self) -> bool {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            self.1 = self.1 || self.0.as_mut().poll(&mut context).is_ready();
            self.1
        }
    }

    /// Runs a batch of `calls` calls as `execute` does.
    fn run(sessions: &Sessions, ticket: &Ticket, calls: usize) -> Result<(), Refusal> {
        let session = sessions.open(ticket)?;
        let mut window = session.try_lock().unwrap();
        window.acknowledge(ticket);
        if window.recall(ticket)?.is_some() {
            return Ok(());
        }
        let room = sessions.room(&window, ticket, calls)?;
        window.record(ticket, vec![SeamcallResult::default(); calls], room);
        Ok(())
    }

    fn acknowledging(session: &str, sequence: u64, acknowledged: u64) -> Ticket {
        Ticket {
            acknowledged,
            ..ticket(session, sequence)
        }
    }

    #[test]
    fn answers_take_no_more_than_a_session_may_until_they_are_acknowledged() {
        let memory = ReplayMemory::new(u64::MAX, 2 * bytes_of(10));
        let sessions = Sessions::new(2, 8, Arc::clone(&memory), "instance".into());
        for sequence in [1, 2] {
            run(&sessions, &ticket("s", sequence), 10).unwrap();
        }
        let full = run(&sessions, &ticket("s", 3), 10).unwrap_err();
        assert!(matches!(full, Refusal::ReplayFull { held, .. } if held == 2 * bytes_of(10)));
        // Both answers are there still, and the refused number has not run.
        let session = sessions.open(&ticket("s", 1)).unwrap();
        for sequence in [1, 2] {
            let window = session.try_lock().unwrap();
            assert!(window.recall(&ticket("s", sequence)).unwrap().is_some());
            assert_eq!(window.recall(&ticket("s", 3)), Ok(None));
        }
        run(&sessions, &acknowledging("s", 3, 1), 10).unwrap();
        let window = session.try_lock().unwrap();
        assert!(matches!(
            window.recall(&ticket("s", 1)),
            Err(Refusal::BelowWindow { lowest: 2, .. })
        ));
        assert!(window.recall(&ticket("s", 2)).unwrap().is_some());
        assert_eq!(memory.taken(), 2 * bytes_of(10));
    }

    #[test]
    fn what_leaves_the_window_makes_room_for_what_comes() {
        let memory = ReplayMemory::new(u64::MAX, 2 * bytes_of(10));
        let sessions = Sessions::new(2, 2, Arc::clone(&memory), "instance".into());
        for sequence in 1..=9 {
            run(&sessions, &ticket("s", sequence), 10).unwrap();
            assert!(memory.taken() <= 2 * bytes_of(10));
        }
    }

    #[test]
    fn all_sessions_share_a_bound_and_only_abandoned_ones_go_for_it() {
        let memory = ReplayMemory::new(3 * bytes_of(10), u64::MAX);
        let sessions = Sessions::new(8, 8, Arc::clone(&memory), "instance".into());
        for name in ["one", "two", "three"] {
            run(&sessions, &ticket(name, 1), 10).unwrap();
        }
        let full = run(&sessions, &ticket("four", 1), 10).unwrap_err();
        assert!(matches!(full, Refusal::ReplayFull { .. }), "{full}");
        // A connection may be lost just now: its answers stay.
        for name in ["one", "two", "three"] {
            let session = sessions.open(&ticket(name, 1)).unwrap();
            let window = session.try_lock().unwrap();
            assert!(window.recall(&ticket(name, 1)).unwrap().is_some());
        }
        // Of those that nobody came back for the least recently used one goes, unless it is held.
        let held = sessions.open(&ticket("one", 2)).unwrap();
        for name in ["one", "two"] {
            let session = sessions.open(&ticket(name, 2)).unwrap();
            session.try_lock().unwrap().used -= ABANDONED_AFTER;
        }
        run(&sessions, &ticket("four", 1), 10).unwrap();
        assert!(matches!(
            run(&sessions, &ticket("two", 2), 1),
            Err(Refusal::UnknownSession { .. })
        ));
        assert!(run(&sessions, &ticket("one", 1), 10).is_ok());
        drop(held);
        assert_eq!(sessions.bytes(), 3 * bytes_of(10));
    }

    #[tokio::test]
    async fn what_an_ended_session_took_is_given_back() {
        let memory = ReplayMemory::new(bytes_of(10), u64::MAX);
        let sessions = Sessions::new(8, 8, Arc::clone(&memory), "instance".into());
        run(&sessions, &ticket("gone-s0", 1), 10).unwrap();
        sessions.end("gone-").await;
        assert_eq!(memory.taken(), 0);
    }

    #[test]
    fn a_batch_that_ends_early_gives_back_what_its_answer_does_not_take() {
        let memory = ReplayMemory::new(u64::MAX, u64::MAX);
        let mut window = Window::new(4);
        let room = memory.take(bytes_of(100)).unwrap();
        window.record(&ticket("s", 1), answer(1), room);
        assert_eq!(memory.taken(), bytes_of(1));
        drop(window);
        assert_eq!(memory.taken(), 0);
    }

    #[test]
    fn a_session_begins_at_one() {
        let sessions = sessions(2, 4);
        let refusal = sessions.open(&ticket("s", 2)).unwrap_err();
        assert!(matches!(
            refusal,
            Refusal::UnknownSession { sequence: 2, .. }
        ));
        let first = sessions.open(&ticket("s", 1)).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &sessions.open(&ticket("s", 2)).unwrap()
        ));
    }

    #[test]
    fn the_least_recently_used_session_that_nobody_holds_is_forgotten() {
        let sessions = sessions(2, 4);
        let held = sessions.open(&ticket("held", 1)).unwrap();
        drop(sessions.open(&ticket("idle", 1)).unwrap());
        let third = sessions.open(&ticket("third", 1)).unwrap();
        assert!(sessions.open(&ticket("idle", 2)).is_err());
        assert!(Arc::ptr_eq(
            &held,
            &sessions.open(&ticket("held", 2)).unwrap()
        ));

        let refusal = sessions.open(&ticket("fourth", 1)).unwrap_err();
        assert_eq!(refusal, Refusal::TooManySessions { limit: 2 });
        drop(third);
        assert!(sessions.open(&ticket("fourth", 1)).is_ok());
    }
}
