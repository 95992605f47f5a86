//! Rolling replacements.

use super::*;

#[test]
fn on_free_ports_the_new_one_is_healthy_before_the_old_one_goes() {
    let mut world = World::healthy(count("a", 2));
    assert_eq!(world.apply(1, [count("b", 2)]), ["publish web", "spawn 3 b on any"]);
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.started(3), [""; 0]);
    assert_eq!(world.pass(3), ["publish web", "retire 1", "spawn 4 b on any"]);
    assert_eq!(world.rotation(), [3, 2]);
    assert_eq!(world.up(4), ["publish web", "retire 2", "answer 1"]);
    assert_eq!(world.rotation(), [3, 4]);
    assert_eq!(world.facts.last(), Some(&Fact::RolloutDone { skipped: Vec::new() }));
}

#[test]
fn stopped_first_the_old_one_is_gone_before_the_new_one_starts() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    let shown = world.apply(1, [stop_first(ports("b", &[9002, 9003]))]);
    assert_eq!(shown, ["publish web", "retire 1"]);
    assert_eq!(world.rotation(), [2]);
    assert!(matches!(world.coming(), Coming::At(_)), "as good as starting");
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.exit(1), [""; 0]);
    assert_eq!(world.gone(1), ["publish web", "spawn 3 b on 9002"]);
    assert_eq!(world.up(3), ["publish web", "retire 2"]);
    world.idle(2);
    assert_eq!(world.end(2), ["publish web", "spawn 4 b on 9003"]);
    assert_eq!(world.up(4), ["publish web", "answer 1"]);
}

#[test]
fn stopped_first_no_two_of_a_slot_run_at_once_on_whatever_sockets() {
    for socket in [SocketMode::Bind, SocketMode::Inherit, SocketMode::Unix, SocketMode::Direct] {
        let mut config = stop_first(count("a", 2));
        Arc::make_mut(&mut config.worker).socket = socket;
        let mut world = World::healthy(config);
        world.restart(1, None);
        assert_eq!(world.spawns.len(), 2, "{socket:?}: its successor waits");
        assert_eq!(world.idle(1), ["SIGTERM 1"]);
        world.exit(1);
        assert_eq!(world.spawns.len(), 2, "{socket:?}: its children may still run");
        assert!(world.gone(1).iter().any(|effect| effect.starts_with("spawn 3 a")));
        world.up(3);
        assert_eq!((world.rotation(), world.spawns.len()), (vec![3], 3), "{socket:?}");
        world.idle(2);
        world.end(2);
        assert!(world.up(4).contains(&"answer 1".to_owned()), "{socket:?}");
    }
}

#[test]
fn stopped_first_it_is_so_after_a_crash_and_for_a_slot_that_comes_back() {
    let mut world = World::healthy(stop_first(count("a", 2)));
    world.exit(1);
    world.wait(SEC(1));
    assert_eq!(world.spawns.len(), 2, "what it left still runs");
    assert!(world.gone(1).contains(&"spawn 3 a on any".to_owned()));
    world.up(3);
    world.apply(1, [stop_first(count("a", 1))]);
    world.idle(2);
    world.apply(2, [stop_first(count("a", 2))]);
    assert_eq!(world.spawns.len(), 3);
    assert!(world.end(2).contains(&"spawn 4 a on any".to_owned()));
}

#[test]
fn a_replacement_that_fails_leaves_the_old_ones_as_they_were() {
    let mut world = World::healthy(count("a", 2));
    let mut changed = count("b", 2);
    changed.restart.min_delay = MS(50);
    world.apply(1, [changed]);
    assert_eq!(
        world.fail_to_start(3),
        [
            "publish web",
            "answer 1: web: slot 0: no such file; the 2 old workers still serve, nothing changed",
            "restored web"
        ]
    );
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.web().config, count("a", 2), "the old settings are in force");
    world.end(1);
    assert_eq!(world.wait(MS(100))[1], "spawn 4 a on any", "also for later restarts");
    let shown = world.apply(2, [count("b", 2)]);
    let expected = ["retire 4", "spawn 5 b on any", "spawn 6 b on any"];
    assert_eq!(
        shown, expected,
        "until the next reload, and nobody waits for the one that was down"
    );
}

#[test]
fn a_slot_that_was_moved_already_is_moved_back() {
    let mut world = World::healthy(count("a", 2));
    world.apply(1, [count("b", 2)]);
    world.up(3);
    world.idle(1);
    world.end(1);
    let shown = world.fail_to_start(4);
    let error = "web: slot 1: no such file; 2 workers serve; the one that was replaced before goes \
        back to the old settings";
    assert_eq!(shown, [&format!("answer 1: {error}"), "restored web", "spawn 5 a on any"]);
    assert_eq!(world.up(5), ["publish web", "retire 3"]);
    assert_eq!(world.rotation(), [5, 2]);
    assert_eq!(world.web().slots[0].spec, spec("a"));
}

#[test]
fn a_vacated_slot_goes_back_to_what_worked_at_once() {
    let mut world = World::healthy(stop_first(ports("a", &[9002, 9003])));
    world.apply(1, [stop_first(ports("b", &[9002, 9003]))]);
    world.idle(1);
    world.end(1);
    world.started(3);
    world.wait(SEC(1));
    assert_eq!(
        world.exit(3),
        ["publish web", "answer 1: web: slot 0: exit status 1; 1 worker serves", "restored web"]
    );
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.gone(3), ["publish web", "spawn 4 a on 9002"], "no backoff");
    assert_eq!(world.up(4), ["publish web"]);
    assert_eq!(world.rotation(), [4, 2]);
}

#[test]
fn a_rollout_that_fails_brings_back_removed_ports_and_drops_new_ones() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [stop_first(ports("b", &[9003, 9004]))]);
    assert_eq!(world.slots(), [(1, Some(9003), None), (2, Some(9004), Some(3))]);
    world.idle(2);
    world.end(2);
    let shown = world.fail_to_start(4);
    assert_eq!(
        shown,
        [
            "reinstate 1",
            "publish web",
            "answer 1: web: slot 1: no such file; no worker serves",
            "restored web",
            "retire 3",
            "publish web",
            "spawn 5 a on 9003"
        ]
    );
    assert_eq!(world.slots(), [(0, Some(9002), Some(1)), (1, Some(9003), Some(5))]);
}

#[test]
fn a_rollback_does_not_take_a_port_back_from_another_service() {
    let api = service("api", "a", Slots::Ports(vec![9002]));
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [stop_first(ports("b", &[9003])), api.clone()]);
    world.idle(2);
    world.end(2);
    assert!(world.fail_to_start(3).contains(&"restored web".to_owned()));
    assert_eq!(world.web().config, ports("a", &[9003]));

    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [stop_first(ports("b", &[9002, 9003]))]);
    world.apply(2, [stop_first(ports("c", &[9003])), api]);
    assert_eq!(world.fail_to_start(2), ["publish web", "spawn 3 c on 9003"]);
    assert!(world.fail_to_start(3).contains(&"restored web".to_owned()));
    assert_eq!(world.web().config, ports("a", &[9003]), "no port of its own is left");
}

#[test]
fn a_rollback_goes_on_where_one_worker_does_not_come_back() {
    let mut world = World::healthy(count("a", 3));
    world.apply(1, [count("b", 3)]);
    world.up(4);
    world.up(5);
    assert_eq!(world.fail_to_start(6)[1..], ["restored web", "spawn 7 a on any"]);
    assert_eq!(world.fail_to_start(7), ["spawn 8 a on any"], "slot 1, whatever slot 0 does");
    world.up(8);
    assert_eq!(world.rotation(), [4, 8, 3]);
}

#[test]
fn so_does_a_reload_to_where_a_rollback_was_leading() {
    let mut world = World::healthy(count("a", 3));
    world.apply(1, [count("b", 3)]);
    world.up(4);
    world.up(5);
    world.fail_to_start(6);
    assert_eq!(world.apply(2, [count("a", 4)]), ["spawn 8 a on any"]);
    assert_eq!(world.fail_to_start(7), ["spawn 9 a on any"]);
    let shown = world.up(9);
    assert_eq!(shown, ["publish web", "retire 5", "answer 2 (web: slot 0: no such file)"]);
}

#[test]
fn a_worker_that_was_not_proven_yet_makes_way_first() {
    let mut world = World::begin(count("a", 1));
    world.started(1);
    assert_eq!(world.restart(1, Some("web")), ["retire 1", "SIGTERM 1", "spawn 2 a on any"]);
    assert_eq!(world.up(2), ["publish web", "answer 1"]);
}

#[test]
fn a_reload_mends_a_service_that_never_came_up() {
    let mut world = World::begin(ports("typo", &[9002]));
    for id in 1..5 {
        world.fail_to_start(id);
        world.wait(MS(100));
    }
    world.fail_to_start(5);
    assert_eq!(world.web().slots[0].backoff.failures(), 5);
    assert_eq!(world.apply(1, [ports("a", &[9002])])[1..], ["spawn 6 a on 9002"], "at once");
    assert_eq!(world.web().slots[0].backoff.failures(), 0, "that was another program");
    assert_eq!(world.up(6), ["publish web", "answer 1"]);
}

#[test]
fn an_old_worker_that_dies_meanwhile_is_replaced_by_the_new_one() {
    let mut world = World::healthy(count("a", 1));
    world.apply(1, [count("b", 1)]);
    assert_eq!(world.end(1), ["publish web"]);
    assert_eq!(world.coming(), Coming::Now);
    assert_eq!(world.up(2), ["publish web", "answer 1"]);
    assert_eq!(world.rotation(), [2]);
}

#[test]
fn where_both_die_the_old_settings_come_back() {
    let mut world = World::healthy(count("a", 1));
    world.apply(1, [count("b", 1)]);
    world.end(1);
    let shown = world.fail_to_start(2);
    let error = "web: slot 0: no such file; no worker serves";
    assert_eq!(shown, [&format!("answer 1: {error}"), "restored web", "spawn 3 a on any"]);
}

#[test]
fn the_port_of_a_replacement_that_fails_is_not_the_slots() {
    let mut config = count("a", 1);
    Arc::make_mut(&mut config.worker).socket = SocketMode::Inherit;
    let mut world = World::healthy(config);
    assert_eq!(world.restart(1, None), ["publish web", "spawn 2 a on any"]);
    world.started(2);
    world.end(2);
    world.end(1);
    assert_eq!(world.wait(MS(100))[1], "spawn 3 a on 40001");
    world.up(3);
    world.restart(2, None);
    world.up(4);
    world.end(4);
    assert_eq!(world.wait(MS(100))[1], "spawn 5 a on 40004", "that of one that took over is");
}

#[test]
fn a_restart_of_some_leaves_the_others_alone_and_no_wish_forgotten() {
    let mut world = World::healthy(count("a", 3));
    world.drain(2);
    let (service, ticket) = (Some("web".into()), Ticket(1));
    let slots = Chosen::These(vec![0, 2]);
    let shown = world.event(Event::Restart { service, slots, ticket });
    assert_eq!(shown, ["publish web", "spawn 4 a on any"]);
    assert_eq!(world.up(4), ["publish web", "retire 1", "spawn 5 a on any", "retire 5"]);
    assert!(world.up(5).contains(&"answer 1".to_owned()));
    assert_eq!(world.rotation(), [4, 2], "what an operator drained stays drained");
}

#[test]
fn a_restart_replaces_one_after_the_other() {
    let mut world = World::healthy(count("a", 2));
    assert_eq!(world.restart(1, Some("web")), ["publish web", "spawn 3 a on any"]);
    world.wait(SEC(2));
    assert_eq!(
        world.restart(2, None),
        ["answer 2: a rolling replacement of web is already under way, for 2s: 0 of 2 replaced, \
          waiting for the new worker of slot 0 to be healthy"]
    );
    assert_eq!(world.up(3), ["publish web", "retire 1", "spawn 4 a on any"]);
    assert_eq!(world.up(4), ["publish web", "retire 2", "answer 1"]);
    assert_eq!(world.restart(3, Some("api")), [r#"answer 3: there is no service "api""#]);
}

#[test]
fn a_restart_that_fails_stops_there() {
    let mut world = World::healthy(count("a", 2));
    world.restart(1, None);
    let error = "web: slot 0: no such file; the 2 old workers still serve, nothing changed";
    assert_eq!(world.fail_to_start(3), ["publish web".to_owned(), format!("answer 1: {error}")]);
    assert_eq!((world.rotation(), world.spawns.len()), (vec![1, 2], 3));
}

#[test]
fn one_answer_for_all_services() {
    let api = |command| service("api", command, Slots::Count(NonZeroU32::MIN));
    let mut world = World::healthy(count("a", 1));
    assert_eq!(world.apply(1, [count("a", 1), api("a")]).last().unwrap(), "spawn 2 a on any");
    world.up(2);
    let shown = world.restart(2, None);
    assert_eq!(shown[2..], ["spawn 3 a on any", "spawn 4 a on any"]);
    assert_eq!(world.fail_to_start(4), ["publish api"]);
    let shown = world.fail_to_start(3);
    let why = "slot 0: no such file; the old worker still serves, nothing changed";
    assert_eq!(shown, ["publish web".to_owned(), format!("answer 2: api: {why}; web: {why}")]);
}

#[test]
fn the_same_settings_again_wait_for_the_rollout_under_way() {
    let mut world = World::healthy(count("a", 1));
    world.apply(1, [count("b", 1)]);
    assert_eq!(world.apply(2, [count("b", 1)]), [""; 0]);
    assert_eq!(world.up(2), ["publish web", "retire 1", "answer 1", "answer 2"]);
    world.restart(3, None);
    assert_eq!(world.apply(4, [count("b", 1)]), ["answer 4"], "there is nothing to wait for");
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 3"], "and the restart goes on");
}

#[test]
fn another_reload_ends_the_rollout_under_way() {
    let mut world = World::healthy(count("a", 2));
    world.apply(1, [count("b", 2)]);
    assert_eq!(
        world.apply(2, [count("c", 2)]),
        ["answer 1: another change was applied", "retire 3", "spawn 4 c on any"]
    );
    let error = "web: slot 0: no such file; the 2 old workers still serve, nothing changed";
    assert_eq!(world.fail_to_start(4)[1], format!("answer 2: {error}"));
    assert_eq!(world.web().config, count("a", 2), "what worked last, not what was tried last");
}

#[test]
fn the_way_back_undoes_a_rollout_under_way() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [stop_first(ports("b", &[9002, 9003]))]);
    world.idle(1);
    world.end(1);
    world.up(3);
    world.idle(2);
    assert_eq!(
        world.apply(2, [stop_first(ports("a", &[9002, 9003]))])[1..],
        ["answer 1: another change was applied", "retire 3"]
    );
    assert_eq!(world.end(2), ["publish web", "spawn 4 a on 9003"]);
}

#[test]
fn a_reload_waits_for_what_the_one_before_left_unproven() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [stop_first(ports("b", &[9002, 9003]))]);
    world.idle(1);
    world.end(1);
    let shown = world.apply(2, [stop_first(ports("b", &[9002, 9003, 9004]))]);
    assert_eq!(shown, ["answer 1: another change was applied", "spawn 4 b on 9004"]);
    assert_eq!(world.rotation(), [2], "9003 serves until 9002 is proven");
    let error = "web: slot 0: no such file; 1 worker serves";
    assert_eq!(world.fail_to_start(3)[1], format!("answer 2: {error}"));
    assert_eq!(world.web().config, ports("a", &[9002, 9003]));
    assert_eq!(world.rotation(), [2]);
}

#[test]
fn a_reload_keeps_a_replacement_that_is_just_what_it_wants() {
    let mut world = World::healthy(count("a", 2));
    world.apply(1, [count("b", 2)]);
    let shown = world.apply(2, [count("b", 3)]);
    assert_eq!(shown, ["answer 1: another change was applied", "spawn 4 b on any"]);
    assert_eq!(world.up(3), ["publish web", "retire 1", "spawn 5 b on any"]);
    assert_eq!(world.up(5), ["publish web", "retire 2", "answer 2"]);
}

/// The service "web" on these ports, whose sockets the workers inherit.
fn inherited(command: &str, on: &[u16]) -> config::Service {
    let mut config = ports(command, on);
    Arc::make_mut(&mut config.worker).socket = SocketMode::Inherit;
    config
}

#[test]
fn on_an_inherited_port_the_new_one_is_healthy_before_the_old_one_goes() {
    let mut world = World::healthy(inherited("a", &[9002]));
    assert_eq!(world.apply(1, [inherited("b", &[9002])]), ["publish web", "spawn 2 b on 9002"]);
    assert_eq!(world.rotation(), [1]);
    assert_eq!(world.up(2), ["publish web", "retire 1", "answer 1"]);
    assert_eq!(world.rotation(), [2]);
}

#[test]
fn a_third_on_an_inherited_port_waits_until_the_first_is_gone() {
    let mut world = World::healthy(inherited("a", &[9002]));
    world.restart(1, None);
    world.up(2);
    assert_eq!(world.restart(2, None), [""; 0], "the first still drains");
    world.end(1);
    assert_eq!(world.spawns.last().map(|spawn| spawn.id.0), Some(3));
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 2"]);
}

#[test]
fn a_hung_worker_on_an_inherited_port_is_replaced_before_it_is_gone() {
    let mut config = inherited("a", &[9002]);
    config.restart.unhealthy_after = SEC(1);
    let mut world = World::healthy(config);
    world.fall(1);
    assert_eq!(world.rotation(), [0; 0]);
    world.wait(SEC(1));
    world.wait(MS(100));
    assert_eq!(world.spawns.last().map(|spawn| spawn.id.0), Some(2));
}

#[test]
fn from_binding_to_inheriting_a_stand_in_serves_meanwhile() {
    let mut world = World::healthy(ports("a", &[9002]));
    assert_eq!(world.apply(1, [inherited("a", &[9002])]), ["publish web", "spawn 2 a on any"]);
    assert_eq!(world.up(2), ["publish web", "retire 1"]);
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 a on 9002"]);
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 1"]);
    // And where it is to be stopped first.
    let mut world = World::healthy(ports("a", &[9002]));
    let shown = world.apply(1, [stop_first(inherited("a", &[9002]))]);
    assert_eq!(shown, ["publish web", "retire 1"]);
    assert_eq!(world.end(1).last().map(String::as_str), Some("spawn 2 a on 9002"));
}

#[test]
fn a_rollout_that_fails_tells_what_the_worker_said_last() {
    let mut world = World::healthy(count("a", 2));
    world.restart(1, None);
    world.started(3);
    let said = vec!["Error: Cannot find module './app'".to_owned(), "    at Module".to_owned()];
    let shown =
        world.event(Event::Exited { id: WorkerId(3), exit: Exit::Code(1), said: said.clone() });
    let reason = "slot 0: exit status 1; the 2 old workers still serve, nothing changed";
    let answer = format!(
        "answer 1: web: {reason}; it said last:\n    Error: Cannot find module './app'\n        at Module"
    );
    assert_eq!(shown, ["publish web".to_owned(), answer]);
    let failed = Fact::RolloutFailed { reason: reason.to_owned(), said };
    assert_eq!(world.facts.last(), Some(&failed));
    // The one that stays has not ended, nor does it become it when the other one is gone.
    world.gone(3);
    assert_eq!(world.web().slots[0].last_exit, None);
}

#[test]
fn a_replacement_that_is_killed_is_not_the_end_of_the_one_that_stays() {
    let mut config = count("a", 1);
    config.health.start_timeout = SEC(3);
    let mut world = World::healthy(config);
    world.restart(1, None);
    world.started(2);
    world.wait(SEC(4));
    assert_eq!(world.phase(1), Some(Phase::Healthy));
    world.end(2);
    assert_eq!(world.web().slots[0].last_exit, None);
    world.end(1);
    let last = world.web().slots[0].last_exit.as_ref();
    assert_eq!(last.map(|exit| exit.how.to_string()).as_deref(), Some("exit status 1"));
}

#[test]
fn what_was_replaced_before_a_restart_failed_stays() {
    let mut world = World::healthy(count("a", 4));
    world.restart(1, None);
    world.up(5);
    world.up(6);
    let error = "web: slot 2: no such file; 4 workers serve; the 2 that were replaced before stay";
    assert_eq!(world.fail_to_start(7)[1], format!("answer 1: {error}"));
    assert_eq!(world.rotation(), [5, 6, 3, 4]);
}
